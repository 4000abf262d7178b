"""CPU time of this run and of other programs, to say when they compete; from Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alps.core.cpu_count import cpu_quota, ranks_on_host

# Least seconds between two readings: the kernel counts in hundredths of a second for each CPU.
_LEAST_SECONDS = 1.0
# Seconds of the readings before a command starts, for which it waits; the second one only if the first sees a load.
_START_SECONDS = (0.2, 0.8)
# Other programs are mentioned when they leave less than this share of the CPUs that the threads of the run could use.
_LEAST_SHARE = 0.75
_PROC = Path("/proc")


@dataclass(frozen=True)
class CpuTime:
    """CPUs that programs share, and the time that they have used.

    Attributes:
        cpus: their number; that of a quota may be a fraction.
        seconds: CPU time of all programs so far.
    """

    cpus: float
    seconds: float


@dataclass(frozen=True)
class CpuReading:
    """CPU times at one moment.

    Attributes:
        wall: the moment, in seconds.
        own: CPU seconds of this run so far, with its child processes and the ranks of torchrun on this host.
        machine: the CPUs of this process's affinity; the time includes what other virtual machines have taken.
        quota: the tightest CPU quota of the control groups; None without any.
    """

    wall: float
    own: float
    machine: CpuTime
    quota: CpuTime | None = None

    def others_since(self, before: CpuReading) -> tuple[CpuTime, ...]:
        """Return the CPUs that other programs used on average since an earlier reading.

        Returns:
            The machine's CPUs and those of the quota, each with the number used by others as `seconds` in a second.
            Empty when the counters contradict each other, which happens when a process of this run has just ended.
        """
        wall, own = self.wall - before.wall, self.own - before.own
        if wall <= 0 or not 0 <= own <= 1.1 * wall * self.machine.cpus + 0.1:
            return ()
        pairs = [(self.machine, before.machine)]
        if self.quota is not None and before.quota is not None and self.quota.cpus == before.quota.cpus:
            pairs.append((self.quota, before.quota))
        return tuple(
            CpuTime(after.cpus, min(max(after.seconds - first.seconds - own, 0.0) / wall, after.cpus))
            for after, first in pairs
        )


class CpuContention:
    """Finder of other programs that take the CPUs from the threads of this run.

    Args:
        count_threads: returns the number of threads that this run computes with, all ranks on this host together.
        read: returns the present CPU times, or None where the system does not have them.
        least_seconds: least time between two readings.
    """

    def __init__(
        self,
        count_threads: Callable[[], int],
        read: Callable[[], CpuReading | None] | None = None,
        least_seconds: float = _LEAST_SECONDS,
    ) -> None:
        self._count_threads, self._read, self._least_seconds = count_threads, read or read_cpu_times, least_seconds
        self._last = self._read()
        self._sentence = ""

    def describe(self) -> str:
        """Return `other programs use 1.8 of 2 CPUs` if they slowed this run since the last call, and nothing else.

        A call within `least_seconds` of the last reading returns the same as that one.
        """
        reading = self._read()
        if reading is None or self._last is None:
            return ""
        if reading.wall - self._last.wall >= self._least_seconds:
            self._sentence = self._compare(reading, self._last)
            self._last = reading
        return self._sentence

    def _compare(self, reading: CpuReading, before: CpuReading) -> str:
        for others in reading.others_since(before):
            threads = min(self._count_threads(), others.cpus)
            if others.cpus - others.seconds < _LEAST_SHARE * threads:
                return f"other programs use {others.seconds:.1f} of {others.cpus:g} CPUs"
        return ""


def is_busy(threads: int) -> bool:
    """Return whether other programs now use CPUs that a number of threads need.

    Takes a fifth of a second on an idle machine, and a second on a busy one, so that a short load does not count.
    """
    contention = CpuContention(lambda: threads, least_seconds=min(_START_SECONDS))
    for seconds in _START_SECONDS:
        time.sleep(seconds)
        if not contention.describe():
            return False
    return True


def read_cpu_times(proc: Path = _PROC) -> CpuReading | None:
    """Return the present CPU times.

    Args:
        proc: the folder that Linux has as `/proc`; another one in tests.

    Returns:
        The times; None on systems without that folder, such as macOS.
    """
    try:
        machine = _machine_time(proc, os.sched_getaffinity(0))
        # torchrun is the parent of all ranks on this host.
        own = _tree_seconds(proc, os.getppid() if ranks_on_host(os.environ) > 1 else os.getpid())
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return None if machine is None else CpuReading(time.monotonic(), own, machine, _quota_time())


def _machine_time(proc: Path, cpus: set[int]) -> CpuTime | None:
    """Return the CPU time of all programs on some CPUs; time without work, and in wait for disks, is not used."""
    ticks = []
    for line in (proc / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            # user (with guests), nice, system, idle, iowait, irq, softirq, steal
            used = list(map(int, fields[:8]))
            ticks.append(sum(used) - sum(used[3:5]))
    return CpuTime(len(ticks), sum(ticks) / os.sysconf("SC_CLK_TCK")) if ticks else None


def _quota_time() -> CpuTime | None:
    quota = cpu_quota()
    if quota is None:
        return None
    try:
        statistics = dict(line.split() for line in (quota.folder / "cpu.stat").read_text().splitlines())
        if "usage_usec" in statistics:
            return CpuTime(quota.cpus, int(statistics["usage_usec"]) / 1e6)
        # Version 1 has it where the controllers cpu and cpuacct are mounted together, as is usual.
        return CpuTime(quota.cpus, int((quota.folder / "cpuacct.usage").read_text()) / 1e9)
    except (OSError, ValueError):
        return None


def _tree_seconds(proc: Path, pid: int) -> float:
    """Return the CPU seconds of a process and its descendants, with those that have ended."""
    seconds = 0.0
    for tasks in (proc / str(pid) / "task").iterdir():
        for child in _children(tasks):
            # Children first: one that ends meanwhile is missing in this sum rather than counted twice.
            try:
                seconds += _tree_seconds(proc, child)
            except (OSError, ValueError, IndexError):
                continue
    # The name of the program, in parentheses, may contain spaces. The next field is the third.
    fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return seconds + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _children(task: Path) -> list[int]:
    try:
        return list(map(int, (task / "children").read_text().split()))
    except OSError:
        # The thread has ended, or the kernel has no such file.
        return []
