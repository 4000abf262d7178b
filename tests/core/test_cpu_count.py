"""CPUs that the process may use, with control groups of both versions as files, and with its real affinity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alps.core import cpu_count as module
from alps.core.cpu_count import affinity_cpus, cpu_quota, ranks_on_host, usable_cpus

_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
_V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def write_tree(root: Path, groups: str, mounts: str, files: dict[str, str]) -> None:
    """Write the files of `/proc/self` and of control groups below a folder."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("limits", "cpus", "folder"),
    [
        ({}, None, None),
        ({"": "max 100000", "a": "max 100000", "a/b": "max 100000"}, None, None),
        ({"a/b": "150000 100000"}, 1.5, "a/b"),
        # The tightest on the path counts, wherever it is.
        ({"": "800000 100000", "a": "200000 100000", "a/b": "400000 100000"}, 2.0, "a"),
        ({"": "50000 100000", "a/b": "400000 100000"}, 0.5, ""),
        # Other periods than the usual one, and groups that this process is not in.
        ({"a": "30000 10000", "a/b": "1000000 500000", "a/c": "1000 100000", "d": "1000 100000"}, 2.0, "a/b"),
        ({"a": "", "a/b": "nonsense 100000"}, None, None),
    ],
)
def test_nested_quotas_of_version_2(
    tmp_path: Path, limits: dict[str, str], cpus: float | None, folder: str | None
) -> None:
    files = {f"sys/fs/cgroup/{name}/cpu.max": text for name, text in limits.items()}
    write_tree(tmp_path, "0::/a/b", f"22 1 0:5 / /proc rw - proc proc rw\n{_V2}", files)
    quota = cpu_quota(tmp_path)
    assert (quota and quota.cpus) == cpus
    if quota is not None and folder is not None:
        assert quota.folder == tmp_path / "sys/fs/cgroup" / folder


@pytest.mark.parametrize(("quota", "cpus"), [(-1, None), (250000, 2.5)])
def test_quotas_of_version_1(tmp_path: Path, quota: int, cpus: float | None) -> None:
    """Both versions are mounted here; the version with the CPU controller has the quota."""
    group = "sys/fs/cgroup/cpu,cpuacct/docker/box"
    files = {f"{group}/cpu.cfs_quota_us": str(quota), f"{group}/cpu.cfs_period_us": "100000"}
    # The memory controller has a group of its own, whose path must not be taken.
    groups = "5:memory:/other\n4:cpu,cpuacct:/docker/box\n0::/unified"
    memory = _V1.replace("cpu,cpuacct", "memory")
    write_tree(tmp_path, groups, f"{memory}\n{_V1}\n{_V2.replace('cgroup rw', 'cgroup/unified rw')}", files)
    result = cpu_quota(tmp_path)
    assert (result and result.cpus) == cpus


@pytest.mark.parametrize(
    ("path", "mounted"),
    [
        # A container that sees the path of the host, and mounts its own group only.
        ("/docker/box", "/docker/box"),
        # A namespace of control groups, or a path that the mount does not have.
        ("/", "/"),
        ("/docker/box", "/elsewhere"),
        ("/../box", "/"),
    ],
)
def test_groups_of_a_container(tmp_path: Path, path: str, mounted: str) -> None:
    files = {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/fs/box/cpu.max": "100000 100000"}
    write_tree(tmp_path, f"0::{path}", _V2.replace(" / /sys", f" {mounted} /sys"), files)
    quota = cpu_quota(tmp_path)
    assert quota is not None and quota.cpus == 3.0


def test_mount_points_with_spaces(tmp_path: Path) -> None:
    files = {"my groups/a/cpu.max": "300000 100000"}
    write_tree(tmp_path, "0::/a", _V2.replace("/sys/fs/cgroup", "/my\\040groups"), files)
    quota = cpu_quota(tmp_path)
    assert quota is not None and quota.folder == tmp_path / "my groups/a"


def test_systems_without_control_groups_have_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    write_tree(tmp_path, "nonsense\n\n", "nonsense\n1 2 - cgroup2\n", {})
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"), [(8, None, 8), (8, 2.9, 2), (2, 6.0, 2), (8, 0.3, 1), (1, 0.3, 1)]
)
def test_the_smaller_of_affinity_and_quota_counts(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, usable: int
) -> None:
    monkeypatch.setattr(module, "affinity_cpus", lambda: affinity)
    monkeypatch.setattr(module, "cpu_quota", lambda: None if quota is None else module.CpuQuota(quota, Path()))
    assert usable_cpus() == usable


def test_the_affinity_of_the_process_counts() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
    code += "from alps.core.cpu_count import affinity_cpus, usable_cpus; print(affinity_cpus(), usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code, str(cpus[-1])], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
    assert 1 <= usable_cpus() <= affinity_cpus() <= len(cpus)


def test_the_count_of_python_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "process_cpu_count", lambda: 4, raising=False)
    assert affinity_cpus() == 4
    monkeypatch.setattr(os, "process_cpu_count", lambda: 32)
    assert affinity_cpus() == 16
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert affinity_cpus() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert affinity_cpus() == 1


@pytest.mark.parametrize(("value", "ranks"), [(None, 1), ("1", 1), ("4", 4), ("0", 1), ("x", 1), ("", 1)])
def test_ranks_on_a_host(value: str | None, ranks: int) -> None:
    assert ranks_on_host({} if value is None else {"LOCAL_WORLD_SIZE": value}) == ranks


def test_the_tests_have_no_more_workers_than_cpus(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pytestconfig.pluginmanager.hasplugin("xdist"):
        pytest.skip("needs pytest-xdist")
    monkeypatch.setattr(module, "usable_cpus", lambda: 7)
    assert pytestconfig.hook.pytest_xdist_auto_num_workers(config=pytestconfig) == 7
