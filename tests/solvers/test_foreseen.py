"""Foreseen penalties against the schedule itself, and inverses made by several processes against one's."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats
from alps.solvers import hessian
from alps.solvers.admm import AdmmSettings
from alps.solvers.foreseen import SharedHessian, foresee, rounds
from alps.solvers.hessian import ScaledHessian, scaled
from helpers.problems import correlated_inputs
from helpers.thread_group import Process, in_threads

FACTORS = [factor for _, factor in AdmmSettings().growth]


@given(st.integers(0, 2), st.integers(0, 12), st.integers(1, 80))
def test_foreseen_penalties_are_sequences_of_growth_that_never_rises(stage: int, times: int, count: int) -> None:
    found = foresee(0.1, stage, times, FACTORS, count)
    assert found[0] == 0.1 and len(found) == len(set(found)) == count
    reachable = {(0.1, stage)}
    for _ in range(count):
        reachable |= {(rho * FACTORS[s], s) for rho, last in reachable if rho < max(found) for s in range(last, 3)}
    assert set(found) <= {rho for rho, _ in reachable}


def test_a_longer_look_holds_the_shorter_one() -> None:
    longest = foresee(0.1, 0, 0, FACTORS, 100)
    assert all(foresee(0.1, 0, 0, FACTORS, count) == longest[:count] for count in range(1, 100))
    # A schedule without growth ends at once.
    assert foresee(0.1, 0, 0, [], 5) == [0.1]


def test_more_processes_take_fewer_rounds() -> None:
    found = [rounds(size) for size in (1, 2, 4, 8, 16, 64)]
    assert found[0] == 11 and found == sorted(found, reverse=True)
    assert found[1] <= 7 and found[3] <= 3 and found[-1] == 1


def _state() -> ScaledHessian:
    return scaled(InputStats.of(correlated_inputs(3, 200, 48)), 0.01)


def _schedule(stages: list[int]) -> list[float]:
    rhos = [0.1]
    for stage in stages:
        rhos.append(rhos[-1] * (0.2 if stage < 0 else FACTORS[stage]))
    return rhos


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kept", [2**28, 0])
def test_every_process_gets_the_inverses_of_one(size: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual schedule, one that begins anew, and one that grows again, twice over."""
    monkeypatch.setattr("alps.solvers.hessian._CACHE_BYTES", kept)
    made: Counter[int] = Counter()
    fresh, lock = ScaledHessian._fresh, threading.Lock()
    again: list[bool] = []

    def counted(self: ScaledHessian, rho: float, dtype: torch.dtype) -> Any:
        with lock:
            made[threading.get_ident()] += 1
            again.append((rho, dtype) in self._inverses)
        return fresh(self, rho, dtype)

    parts = _schedule([0] * 6 + [1, 1, 2]) + _schedule([-1, 0, 0, 1]), _schedule([0] * 4 + [1, 0, 2, 0])
    rhos = [rho for part in parts for rho in part]
    expected = [_state().inverse(rho) for rho in rhos]
    monkeypatch.setattr(ScaledHessian, "_fresh", counted)

    def ask(rows: Process) -> list[Any]:
        # Two sites of one input: the second one finds what is kept.
        state = _state()
        sites = (SharedHessian(state, rows, AdmmSettings()) for _ in range(2))
        return [site.inverse(rho).clone() for site, part in zip(sites, parts, strict=True) for rho in part]

    for answers in in_threads(size, ask):
        assert all(torch.equal(mine, one) for mine, one in zip(answers, expected, strict=True))
    assert not any(again)
    asked = len(set(rhos)) if kept else len(rhos)
    if size == 1:
        assert list(made.values()) == [asked]
    else:
        assert len(made) == size and max(made.values()) <= 0.75 * asked


def test_processes_with_unequal_memory_keep_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with more room would not take part in what the other needs sent again."""
    rhos = (0.1, 0.13, 0.1, 0.13)
    expected = [_state().inverse(rho) for rho in rhos]
    rooms: dict[int, int] = {}
    monkeypatch.setattr(hessian, "kept_bytes", lambda _: rooms[threading.get_ident()])
    one = _state().matrix.nbytes

    def ask(rows: Process) -> tuple[list[torch.Tensor], int]:
        rooms[threading.get_ident()] = (1 + 2 * rows.rank) * one
        shared = SharedHessian(_state(), rows, AdmmSettings())
        return [shared.inverse(rho).clone() for rho in rhos], len(shared._inverses)

    for answers, kept in in_threads(2, ask):
        assert kept == 1
        assert all(torch.equal(mine, one) for mine, one in zip(answers, expected, strict=True))


def test_only_a_penalty_that_is_met_may_fail() -> None:
    """An indefinite matrix: 0.1 and all that is foreseen from it fails, half of its mean diagonal does not."""
    matrix = torch.eye(8)
    matrix[0, 1] = matrix[1, 0] = 1.4
    state = ScaledHessian(matrix, torch.ones(8), 0.0)

    def ask(rows: Process) -> list[str]:
        shared, found = SharedHessian(state, rows, AdmmSettings()), []
        for rho in (0.5, 0.1):
            try:
                found.append("finite" if bool(shared.inverse(rho).isfinite().all()) else "infinite")
            except SolveFailed as error:
                found.append(str(error))
        return found

    for found in in_threads(2, ask):
        assert found[0] == "finite" and "not positive definite at rho = 0.1" in found[1]
