"""Tests of CPU times: made-up counters, those of real processes, and a machine that is really busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alps.core import cpu_load as module
from alps.core.cpu_count import CpuQuota
from alps.core.cpu_load import CpuContention, CpuReading, CpuTime, is_busy, read_cpu_times

_TICKS = os.sysconf("SC_CLK_TCK")


class FakeMachine:
    """A machine with counters that a test advances."""

    def __init__(self, cpus: int = 2, quota: float | None = None) -> None:
        self.wall, self.own, self.all, self.group, self.cpus, self.quota = 0.0, 0.0, 0.0, 0.0, cpus, quota

    def advance(self, wall: float, own: float, others: float, in_group: float = 0.0) -> None:
        """Let time pass in which this run and other programs use so many CPUs; some of the others share its quota."""
        self.wall += wall
        self.own += own * wall
        self.all += (own + others) * wall
        self.group += (own + in_group) * wall

    def read(self) -> CpuReading:
        """Return the counters."""
        quota = None if self.quota is None else CpuTime(self.quota, self.group)
        return CpuReading(self.wall, self.own, CpuTime(self.cpus, self.all), quota)


@pytest.mark.parametrize(
    ("cpus", "threads", "own", "others", "sentence"),
    [
        # An idle machine, whether all threads are at work or one of them.
        (2, 2, 2.0, 0.0, ""),
        (2, 2, 1.97, 0.03, ""),
        (2, 2, 1.0, 0.0, ""),
        (2, 2, 0.1, 0.0, ""),
        # Two busy programs on both CPUs.
        (2, 2, 0.2, 1.8, "other programs use 1.8 of 2 CPUs"),
        (2, 2, 1.0, 1.0, "other programs use 1.0 of 2 CPUs"),
        # One thread with a CPU to itself, and one without.
        (2, 1, 1.0, 1.0, ""),
        (2, 1, 0.66, 1.34, "other programs use 1.3 of 2 CPUs"),
        # As many CPUs left as the threads use, and fewer.
        (64, 32, 32.0, 30.0, ""),
        (64, 32, 20.0, 44.0, "other programs use 44.0 of 64 CPUs"),
        # More threads than CPUs compete with each other.
        (2, 8, 2.0, 0.0, ""),
    ],
)
def test_others_are_named_when_they_take_cpus_that_the_threads_could_use(
    cpus: int, threads: int, own: float, others: float, sentence: str
) -> None:
    machine = FakeMachine(cpus)
    contention = CpuContention(lambda: threads, machine.read)
    machine.advance(5.0, own, others)
    assert contention.describe() == sentence


def test_each_call_describes_the_time_since_the_last_one() -> None:
    machine = FakeMachine()
    contention = CpuContention(lambda: 2, machine.read)
    machine.advance(10.0, 2.0, 0.0)
    assert contention.describe() == ""
    machine.advance(5.0, 0.5, 1.5)
    busy = contention.describe()
    assert busy == "other programs use 1.5 of 2 CPUs"
    # Too soon for counters of hundredths of a second; the reading is not lost.
    machine.advance(0.5, 2.0, 0.0)
    assert contention.describe() == busy
    machine.advance(0.6, 2.0, 0.0)
    assert contention.describe() == ""


@pytest.mark.parametrize(("in_group", "sentence"), [(0.0, ""), (0.1, ""), (1.2, "other programs use 1.2 of 2 CPUs")])
def test_programs_with_the_same_quota_are_others_too(in_group: float, sentence: str) -> None:
    """A container with 2 of 64 CPUs: what the host does is no matter while CPUs are left."""
    machine = FakeMachine(cpus=64, quota=2.0)
    contention = CpuContention(lambda: 2, machine.read)
    machine.advance(5.0, 2.0 - in_group, 55.0, in_group)
    assert contention.describe() == sentence


def test_counters_that_contradict_each_other_mean_nothing() -> None:
    """A process of this run that ends while it is read is missing once, or is counted twice."""
    machine = FakeMachine()
    contention = CpuContention(lambda: 2, machine.read)
    for jump in (-100.0, 100.0):
        machine.advance(5.0, 0.0, 2.0)
        machine.own += jump
        assert contention.describe() == ""
    machine.advance(5.0, 0.0, 2.0)
    assert contention.describe() == "other programs use 2.0 of 2 CPUs"


def test_systems_without_counters_say_nothing(tmp_path: Path) -> None:
    assert read_cpu_times(tmp_path) is None
    (tmp_path / "stat").write_text("cpu nonsense\n")
    assert read_cpu_times(tmp_path) is None
    assert CpuContention(lambda: 2, lambda: None).describe() == ""


def write_process(proc: Path, pid: int, ticks: str, children: dict[int, str]) -> None:
    """Write the files of a process with some threads, each of which has started some children."""
    for thread, started in children.items():
        (proc / f"{pid}/task/{thread}").mkdir(parents=True)
        (proc / f"{pid}/task/{thread}/children").write_text(started)
    (proc / f"{pid}/stat").write_text(f"{pid} (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 20 0 1 0 5 0 0")


def test_the_files_of_the_system_are_read_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, parent = os.getpid(), os.getppid()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 11})
    monkeypatch.setattr(module, "cpu_quota", lambda: CpuQuota(1.5, tmp_path))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "cpu.stat").write_text("usage_usec 7500000\nnr_periods 0\n")
    # Guests are part of user, idle time and waits for disks are not used.
    lines = [f"cpu{n} 100 20 3 {1000 * n} 500 4 5 6 90 9" for n in (0, 1, 11)]
    (tmp_path / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 1 2 3"]))
    write_process(tmp_path, parent, "1000 0 0 0", {parent: f"{pid} 900001"})
    write_process(tmp_path, pid, "10 20 30 40", {pid: "900002", 900003: "900004 900005"})
    write_process(tmp_path, 900001, "2000 0 0 0", {900001: ""})
    write_process(tmp_path, 900002, "0 100 0 0", {900002: "900006"})
    write_process(tmp_path, 900004, "200 0 0 0", {900004: ""})
    write_process(tmp_path, 900006, "400 0 0 0", {900006: ""})
    reading = read_cpu_times(tmp_path)
    assert reading is not None
    assert reading.machine == CpuTime(2, 2 * 138 / _TICKS)
    assert reading.quota == CpuTime(1.5, 7.5)
    # With its descendants, of which 900005 has ended meanwhile, and without the parent and its other children.
    assert reading.own == 800 / _TICKS
    # With torchrun the parent and the other ranks belong to the run.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    reading = read_cpu_times(tmp_path)
    assert reading is not None and reading.own == 3800 / _TICKS


@pytest.mark.parametrize(("name", "text"), [("cpuacct.usage", "7500000000\n"), ("nothing", "")])
def test_quotas_of_version_1_have_their_use_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setattr(module, "cpu_quota", lambda: CpuQuota(1.5, tmp_path))
    (tmp_path / "cpu.stat").write_text("nr_periods 0\nnr_throttled 0\nthrottled_time 0\n")
    (tmp_path / name).write_text(text)
    reading = read_cpu_times()
    assert reading is not None
    assert reading.quota == (CpuTime(1.5, 7.5) if text else None)


@pytest.mark.parametrize(
    ("others", "busy", "waits"),
    [
        ((0.0,), False, [0.2]),
        ((0.4,), False, [0.2]),
        # A load that is gone within a second.
        ((2.0, 0.3), False, [0.2, 0.8]),
        ((2.0, 1.0), True, [0.2, 0.8]),
    ],
)
def test_a_command_measures_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, others: tuple[float, ...], busy: bool, waits: list[float]
) -> None:
    machine, slept = FakeMachine(), list[float]()

    def sleep(seconds: float) -> None:
        machine.advance(seconds, 0.0, others[len(slept)])
        slept.append(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(module, "read_cpu_times", machine.read)
    assert is_busy(2) is busy
    assert slept == waits


# Computes for two seconds, alone or with a process on each CPU. Prints what it sees of others and of itself, and the
# CPU seconds of itself and of its children as the kernel counts them for each process.
_SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path
from alps.core.cpu_load import CpuContention, read_cpu_times
def counted():
    fields = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in children]
    ticks = sum(int(part[11]) + int(part[12]) for part in fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
loop = "import time; end = time.monotonic() + 60\\nwhile time.monotonic() < end: pass"
cpus = os.sched_getaffinity(0) if sys.argv[1] == "children" else ()
children = [subprocess.Popen([sys.executable, "-c", loop]) for _ in cpus]
time.sleep(0.3)
first, before, contention = counted(), read_cpu_times(), CpuContention(lambda: len(os.sched_getaffinity(0)))
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
sentence, after, last = contention.describe(), read_cpu_times(), counted()
(machine,) = after.others_since(before)[:1]
print(json.dumps([sentence, machine.seconds, (after.own - before.own), last - first]))
for child in children:
    child.kill()
    child.wait()
"""


# Starts processes that compute without a pause for a minute, prints their numbers, and ends.
_SPIN = """
import subprocess, sys
loop = "import time; end = time.monotonic() + 60\\nwhile time.monotonic() < end: pass"
for _ in range(int(sys.argv[1])):
    started = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(started.pid)
"""


@pytest.fixture
def spinning() -> Iterator[None]:
    """Two processes on each CPU that compute without a pause, and are no children of this one."""
    command = [sys.executable, "-c", _SPIN, str(2 * len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    yield
    for pid in map(int, done.stdout.split()):
        os.kill(pid, signal.SIGKILL)


def watch(mode: str) -> tuple[str, float, float, float]:
    """Return a new process's sentence, the CPUs that others use, its CPU seconds, and those that the kernel counts."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True)
    sentence, others, own, counted = json.loads(done.stdout)
    return sentence, others, own, counted


@pytest.mark.skipif(read_cpu_times() is None, reason="this system has no counters")
@pytest.mark.usefixtures("spinning")
def test_a_busy_machine_is_noticed() -> None:
    cpus = len(os.sched_getaffinity(0))
    sentence, others, own, counted = watch("alone")
    assert sentence.startswith("other programs use ") and sentence.endswith(f" of {cpus} CPUs")
    assert others > 0.5 * cpus and own == pytest.approx(counted, abs=0.2)
    assert is_busy(cpus)


@pytest.mark.skipif(read_cpu_times() is None, reason="this system has no counters")
def test_child_processes_are_no_other_programs() -> None:
    """Their CPU time is the run's own, on a machine with any load."""
    cpus = len(os.sched_getaffinity(0))
    _, others, own, counted = watch("children")
    assert own == pytest.approx(counted, abs=0.3)
    assert others + own / 2 <= 1.15 * cpus + 0.1
