"""Number of CPUs that this process may use: its affinity, and the CPU quotas of its control groups."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
# A character of a path that the kernel has escaped, such as a space as \040.
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class CpuQuota:
    """CPU time that a control group may use.

    Attributes:
        cpus: seconds of CPU time in a second.
        folder: files of the group that has the quota.
    """

    cpus: float
    folder: Path


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1.

    It is the smallest of the CPUs of the machine, those of the process's affinity (which is also how cpusets of
    containers are seen), and its CPU quota, rounded down. A larger number of threads would be stopped by the kernel in
    every period.
    """
    count, quota = affinity_cpus(), cpu_quota()
    return count if quota is None else max(min(count, int(quota.cpus)), 1)


def affinity_cpus() -> int:
    """Return the number of CPUs on which the kernel may run this process."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    # From Python 3.13 on; users can lower it by PYTHON_CPU_COUNT.
    process_cpu_count = getattr(os, "process_cpu_count", None)
    if process_cpu_count is not None:
        counts.append(process_cpu_count() or 1)
    return min(counts)


def ranks_on_host(environment: Mapping[str, str]) -> int:
    """Return the number of ranks that torchrun has started on this host, 1 without torchrun.

    Args:
        environment: variables of the process.
    """
    size = environment.get("LOCAL_WORLD_SIZE", "")
    return max(int(size), 1) if size.isdecimal() else 1


def cpu_quota(root: Path = _ROOT) -> CpuQuota | None:
    """Return the tightest CPU quota of the control groups that this process is in.

    A quota of a group also holds for the groups inside it. Versions 1 and 2 of control groups are read, also where both
    are mounted.

    Args:
        root: folder that has `proc` and the mount points; another one in tests.

    Returns:
        The quota; None without any, or on a system without control groups.
    """
    quotas = [
        CpuQuota(cpus, folder)
        for folder in _group_folders(root)
        if (cpus := _read_version_2(folder) or _read_version_1(folder)) is not None
    ]
    return min(quotas, key=lambda quota: quota.cpus, default=None)


def _group_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups for CPU time, each followed by those around it."""
    groups = _groups(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # number, parent, device, root within the file system, mount point, ..., "-", type, source, options
        before, separator, after = line.partition(" - ")
        fields, options = before.split(), after.split()
        if not separator or len(fields) < 5 or len(options) < 3:
            continue
        version = {"cgroup": 1, "cgroup2": 2}.get(options[0])
        if version is None or version not in groups or (version == 1 and "cpu" not in options[2].split(",")):
            continue
        mounted, point = PurePosixPath(_unescaped(fields[3])), _unescaped(fields[4]).lstrip("/")
        group = groups[version]
        # In a container, the path of the group may be that of the host, and only a part of the tree is mounted.
        inside = group.is_relative_to(mounted) and ".." not in group.parts
        relative = group.relative_to(mounted) if inside else PurePosixPath()
        for part in (relative, *relative.parents):
            yield root / point / part


def _groups(root: Path) -> dict[int, PurePosixPath]:
    """Return the paths of this process's control groups for CPU time by version."""
    groups = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, names = line.partition(":")
        controllers, _, path = names.partition(":")
        if number == "0" and not controllers:
            groups[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            groups[1] = PurePosixPath(path)
    return groups


def _read_version_2(folder: Path) -> float | None:
    """Return the CPUs of `cpu.max`, which has a quota or `max`, and a period."""
    return _ratio(_read(folder / "cpu.max").split())


def _read_version_1(folder: Path) -> float | None:
    """Return the CPUs of `cpu.cfs_quota_us`, which is -1 without a quota."""
    return _ratio([_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])


def _ratio(fields: list[str]) -> float | None:
    """Return quota / period, both in microseconds; None unless both are positive numbers."""
    if len(fields) != 2 or not all(field.isdecimal() and int(field) for field in fields):
        return None
    return int(fields[0]) / int(fields[1])


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)


def _read(path: Path) -> str:
    """Return the text of a file, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
