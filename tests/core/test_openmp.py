"""Settings of OpenMP: how threads wait, and that torch really has no more than the process may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alps.core import openmp as module
from alps.core.openmp import openmp_settings

_WAITING = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
_VARIABLES = (*_WAITING, "KMP_LIBRARY", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, _WAITING),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, set()),
        ({"OMP_WAIT_POLICY": "passive"}, set()),
        # Each is read by one runtime only, so the other one still gets its setting.
        ({"GOMP_SPINCOUNT": "infinity"}, {"KMP_BLOCKTIME"}),
        ({"KMP_BLOCKTIME": "infinite"}, {"GOMP_SPINCOUNT"}),
        ({"KMP_LIBRARY": "turnaround"}, {"GOMP_SPINCOUNT"}),
    ],
)
def test_the_user_s_way_of_waiting_is_kept(variables: dict[str, str], names: set[str]) -> None:
    settings = openmp_settings(variables)
    assert settings.keys() & {*_WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY"} == names


@pytest.mark.parametrize("variables", [{}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "7"}])
def test_threads_spin_for_a_small_part_of_the_default_time_and_not_at_all_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.setattr(module, "usable_cpus", lambda: 4)
    monkeypatch.setattr(module, "affinity_cpus", lambda: 4)
    idle, busy = openmp_settings(variables, lambda _: False), openmp_settings(variables, lambda _: True)
    assert idle == openmp_settings(variables)
    assert idle.keys() == busy.keys() == _WAITING - variables.keys()
    defaults = {"GOMP_SPINCOUNT": 300_000, "KMP_BLOCKTIME": 200}
    assert all(0 < int(turns) <= defaults[name] // 10 for name, turns in idle.items())
    assert set(busy.values()) == {"0"}


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, [4]),
        ({"OMP_NUM_THREADS": "3"}, [3]),
        ({"OMP_NUM_THREADS": "64"}, [4]),
        # All ranks of the host need theirs.
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}, [4]),
        # Where nothing waits, or the user has chosen, nothing is measured.
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"LOCAL_WORLD_SIZE": "4"}, []),
        ({"OMP_WAIT_POLICY": "active"}, []),
        ({"GOMP_SPINCOUNT": "7", "KMP_LIBRARY": "serial"}, []),
    ],
)
def test_the_load_is_measured_once_for_the_threads_of_the_run(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: list[int]
) -> None:
    monkeypatch.setattr(module, "usable_cpus", lambda: 4)
    monkeypatch.setattr(module, "affinity_cpus", lambda: 4)
    measured: list[int] = []
    openmp_settings(variables, lambda count: bool(measured.append(count)))  # type: ignore[func-returns-value]
    assert measured == threads


@pytest.mark.parametrize(
    ("usable", "variables", "threads"),
    [
        # The runtime's own count is right, and stays.
        (8, {}, {}),
        # A quota, which the runtime does not know.
        (2, {}, {"OMP_NUM_THREADS": "2"}),
        (2, {"OMP_NUM_THREADS": "1"}, {}),
        (2, {"OMP_NUM_THREADS": "2"}, {}),
        (2, {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "2"}),
        (8, {"OMP_NUM_THREADS": "64"}, {"OMP_NUM_THREADS": "8"}),
        (2, {"OMP_NUM_THREADS": " +4,2 "}, {"OMP_NUM_THREADS": "2"}),
        (2, {"OMP_NUM_THREADS": "1,4"}, {}),
        (2, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "2"}),
        (8, {"OMP_NUM_THREADS": "many"}, {}),
        (2, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "4"}, {"MKL_NUM_THREADS": "2"}),
        # torchrun's ranks on one host share its CPUs.
        (8, {"LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "2"}),
        (8, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, {}),
        (8, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "8"}, {"OMP_NUM_THREADS": "2"}),
        (2, {"LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_numbers_of_threads(
    monkeypatch: pytest.MonkeyPatch, usable: int, variables: dict[str, str], threads: dict[str, str]
) -> None:
    monkeypatch.setattr(module, "usable_cpus", lambda: usable)
    monkeypatch.setattr(module, "affinity_cpus", lambda: 8)
    settings = openmp_settings(variables)
    assert {name: settings[name] for name in settings if name.endswith("NUM_THREADS")} == threads
    # Settings that are inherited by a child process are not changed again.
    assert openmp_settings({**variables, **settings}) == {}


# Runs the entry point of the command, and prints the number of threads that torch then has.
_SCRIPT = """
import json, os, sys
from pathlib import Path
cpus, quota = json.loads(sys.argv[1])
if cpus:
    os.sched_setaffinity(0, cpus)
import alps.core.cpu_count as cpu_count
if quota:
    group = cpu_count.CpuQuota(quota, Path())
    cpu_count.cpu_quota = lambda: group
from alps.cli.main import run
assert "torch" not in sys.modules
sys.argv[1:] = ["report", "no-such-directory"]
try:
    run()
except SystemExit:
    import torch
print(torch.get_num_threads())
"""


def start(cpus: int, quota: float | None, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script on so many CPUs (0 for all), with a CPU quota, and with only these variables on threads."""
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    arguments = json.dumps([sorted(os.sched_getaffinity(0))[:cpus], quota])
    command = [sys.executable, "-c", _SCRIPT, arguments]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("cpus", "quota", "variables"),
    [
        (1, None, {"OMP_NUM_THREADS": "2"}),
        (0, 1.7, {}),
        (0, None, {"LOCAL_WORLD_SIZE": "64"}),
    ],
)
def test_torch_has_no_more_threads_than_the_process_may_use(
    cpus: int, quota: float | None, variables: dict[str, str]
) -> None:
    assert start(cpus, quota, variables).stdout.splitlines()[-1] == "1"


def test_the_runtime_reads_the_settings() -> None:
    """GNU's libgomp prints its settings when it is loaded."""
    done = start(0, None, {"OMP_DISPLAY_ENV": "VERBOSE"})
    assert 1 <= int(done.stdout.splitlines()[-1]) <= len(os.sched_getaffinity(0))
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here")
    idle, busy = openmp_settings({}), openmp_settings({}, lambda _: True)
    assert any(f"GOMP_SPINCOUNT = '{settings['GOMP_SPINCOUNT']}'" in done.stderr for settings in (idle, busy))


def test_the_tests_themselves_wait_so() -> None:
    assert "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    assert openmp_settings(os.environ) == {}
