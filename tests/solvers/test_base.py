"""The frame of every method: what it refuses, what it answers by itself, and what it checks of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution, SolveInfo, Status
from alps.solvers.patterns import MaskedPattern, Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import normal


@dataclass(frozen=True)
class _Scaled(Method):
    """Keep the largest weights, multiplied by a factor; of the others keep `leftover`."""

    factor: float = 1.0
    leftover: float = 0.0
    surplus: int = 0

    @property
    def name(self) -> str:
        return "scaled"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def prepare(self, stats: InputStats) -> None:
        return None

    def prune_matrix(self, weight: Tensor, state: None, pattern: Pattern) -> Solution:
        mask = keep_largest(weight.abs(), pattern)
        pruned = (~mask).nonzero()[: self.surplus]
        mask[pruned[:, 0], pruned[:, 1]] = True
        return Solution(torch.where(mask, self.factor * weight, self.leftover), mask, SolveInfo())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = normal(1, 4, 8)
    weight[2, 3] = value
    with pytest.raises(SolveFailed, match="the dense weights hold NaN or infinite values: repair the checkpoint first"):
        _Scaled().solve(weight, None, Unstructured(0.5))


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SolveFailed, match="scaled produced NaN or infinite weights: use more calibration tokens"):
        _Scaled(factor=torch.inf).solve(normal(1, 4, 8), None, Unstructured(0.5))


@pytest.mark.parametrize("leftover", [-0.0, torch.nan, 3.0])
def test_pruned_weights_are_positive_zeros(leftover: float) -> None:
    solution = _Scaled(leftover=leftover).solve(normal(1, 4, 8), None, SemiStructured(2, 4))
    assert int((solution.weight.view(torch.int32) == 0).sum()) == 16
    assert torch.equal(solution.weight != 0, solution.mask)


def test_a_support_of_another_size_is_refused() -> None:
    with pytest.raises(SolveFailed, match=r"scaled kept 17 of 32 weights, where the pattern 50% keeps 16: choose"):
        _Scaled(surplus=1).solve(normal(1, 4, 8), None, Unstructured(0.5))


def test_nothing_is_solved_where_nothing_is_to_be_chosen() -> None:
    weight = normal(1, 4, 8)
    broken = _Scaled(factor=torch.nan)
    whole = broken.solve(weight, None, Unstructured(0.0))
    assert whole.info.status is Status.UNCHANGED and torch.equal(whole.weight, weight) and bool(whole.mask.all())
    allowed = keep_largest(weight.abs(), Unstructured(0.6))
    pattern = MaskedPattern(Unstructured(0.5), allowed)
    sparse = broken.solve(weight * allowed, None, pattern)
    assert sparse.info.status is Status.UNCHANGED and torch.equal(sparse.mask, allowed)
    assert torch.equal(sparse.weight, torch.where(allowed, weight, 0.0))
    with pytest.raises(SolveFailed):  # a weight outside the mask has to go
        broken.solve(weight, None, pattern)


def test_weights_of_any_dtype_are_solved_in_float32() -> None:
    weight = normal(1, 4, 8).to(torch.bfloat16)
    solution = _Scaled().solve(weight, None, Unstructured(0.5))
    assert solution.weight.dtype == torch.float32
    assert torch.equal(solution.weight[solution.mask], weight.float()[solution.mask])


def test_times_of_a_phase_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    info = SolveInfo()
    for _ in range(2):
        with info.timed("refit"):
            pass
    assert info.seconds == {"refit": 2.5}
