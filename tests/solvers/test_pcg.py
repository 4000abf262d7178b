"""Tests of the refit: optimal weights on a fixed support, against dense float64 solves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import METHODS, Refitted, get_method
from alps.solvers.hessian import scaled
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from alps.solvers.pcg import pcg_iterations, refit
from helpers.problems import (
    IN,
    OUT,
    PROBLEMS,
    TOKENS,
    best_on_support,
    correlated,
    correlated_inputs,
    hessian64,
    normal,
    objective64,
    random_mask,
)

LIVE = ["gaussian", "correlated", "dead_inputs", "few_tokens", "huge_token", "rounded_weight", "one_output"]


def unit_problem(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return H with unit diagonal, C and the dense weight, all float32, for correlated inputs."""
    weight = normal(seed, OUT, IN)
    state = scaled(InputStats.of(correlated_inputs(seed + 1, TOKENS, IN)), 0.01)
    return state.matrix, weight @ state.matrix, weight


def starts(weight: Tensor) -> dict[str, Tensor]:
    return {
        "dense": weight,
        "zero": torch.zeros_like(weight),
        "random": normal(77, *weight.shape),
        "far": 100 * normal(78, *weight.shape),
    }


@pytest.mark.parametrize("start", ["dense", "zero", "random", "far"])
def test_refit_reaches_the_float64_optimum(start: str) -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    result = refit(H, C, mask, starts(weight)[start], max_steps=200, tolerance=1e-6)
    best = best_on_support(weight, H.double(), mask)
    assert result.residual <= 1e-6
    # Rounding is relative to the largest iterate, so that a distant start has larger rounding errors.
    far = max(1.0, float((starts(weight)[start] * mask).norm() / best.norm()))
    assert float((result.weight.double() - best).norm() / best.norm()) < 1e-4 * far
    excess = objective64(result.weight, weight, H.double()) / objective64(best, weight, H.double())
    assert float(excess.max()) < 1 + 1e-5 * far


@pytest.mark.parametrize("start", ["dense", "zero", "random", "far"])
def test_every_step_lowers_the_objective_of_every_row(start: str) -> None:
    H, C, weight = unit_problem(13)
    mask = random_mask(6, OUT, IN, 0.3)
    begin = starts(weight)[start]
    best = objective64(best_on_support(weight, H.double(), mask), weight, H.double())
    before = objective64(torch.where(mask, begin, 0.0), weight, H.double())
    for steps in range(1, 9):
        result = refit(H, C, mask, begin, max_steps=steps, tolerance=0.0)
        assert result.steps == steps
        after = objective64(result.weight, weight, H.double())
        unfinished = before > best * (1 + 1e-4)
        assert bool((after < before)[unfinished].all())
        assert bool((after <= before + 1e-5 * best).all())
        before = after


def test_the_preconditioner_handles_uneven_diagonals() -> None:
    """Use input scales that differ by 1e4, on which gradients without preconditioning converge slowly."""
    weight = normal(8, OUT, IN)
    inputs = normal(9, TOKENS, IN) * torch.logspace(-2, 2, IN)
    H = inputs.T @ inputs + 1e-3 * torch.eye(IN)
    mask = random_mask(7, OUT, IN)
    result = refit(H, weight @ H, mask, torch.zeros_like(weight), max_steps=30, tolerance=1e-5)
    best = best_on_support(weight, H.double(), mask)
    size = H.double().diagonal().sqrt()
    assert float(((result.weight.double() - best) * size).norm() / (best * size).norm()) < 1e-4


def test_the_tolerance_stops_early() -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    loose = refit(H, C, mask, torch.zeros_like(weight), max_steps=100, tolerance=1e-1)
    tight = refit(H, C, mask, torch.zeros_like(weight), max_steps=100, tolerance=1e-4)
    assert 0 < loose.steps < tight.steps < 100
    assert tight.residual <= 1e-4 < loose.residual <= 1e-1
    none = refit(H, C, mask, torch.zeros_like(weight), max_steps=0, tolerance=1e-4)
    assert none.steps == 0 and not bool(none.weight.any()) and none.residual == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 3, 6, 12])
def test_the_reported_residual_matches_float64(steps: int) -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    result = refit(H, C, mask, weight, max_steps=steps, tolerance=0.0)
    masked = (C.double() - result.weight.double() @ H.double()) * mask
    true = float((masked.norm(dim=1) / (C * mask).double().norm(dim=1)).max())
    assert result.residual == pytest.approx(true, rel=1e-2, abs=1e-6)


def test_rows_without_support_stay_zero() -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    alone = refit(H, C[1:], mask[1:], weight[1:], max_steps=15, tolerance=0.0).weight
    mask[0] = False
    result = refit(H, C, mask, weight, max_steps=15, tolerance=0.0)
    assert not bool(result.weight[0].any())
    # Products of another shape are summed in another order, and steps before convergence amplify the difference.
    torch.testing.assert_close(result.weight[1:], alone, rtol=1e-3, atol=1e-3)


def test_an_empty_support_gives_zero() -> None:
    H, C, weight = unit_problem()
    result = refit(H, C, torch.zeros_like(weight, dtype=torch.bool), weight, max_steps=10, tolerance=1e-5)
    assert result.steps == 0 and result.residual == 0.0 and not bool(result.weight.any())


def test_finished_rows_do_not_change() -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    mask[0] = torch.arange(IN) == 4  # one entry, solved by the first step
    mask[1] = True  # all entries: the dense weight is start and optimum
    C[2] = 0.0  # the optimum is zero
    start = weight.clone()
    start[2] = 0.0
    result = refit(H, C, mask, start, max_steps=150, tolerance=0.0).weight
    assert bool(torch.isfinite(result).all())
    assert float(result[0, 4]) == pytest.approx(float(C[0, 4] / H[4, 4]), rel=1e-5)
    torch.testing.assert_close(result[1], weight[1], rtol=1e-3, atol=1e-4)
    assert not bool(result[2].any())
    best = best_on_support(weight, H.double(), mask)
    torch.testing.assert_close(result[3:].double(), best[3:], rtol=1e-3, atol=1e-4)


def test_full_support_returns_the_dense_weight() -> None:
    H, C, weight = unit_problem()
    everything = torch.ones_like(weight, dtype=torch.bool)
    result = refit(H, C, everything, torch.zeros_like(weight), max_steps=200, tolerance=1e-6)
    assert float((result.weight - weight).norm() / weight.norm()) < 1e-4


@pytest.mark.parametrize("pattern", [Unstructured(0.6), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("problem", LIVE)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_refit_is_near_the_optimum_and_never_raises_the_error(name: str, problem: str, pattern: Pattern) -> None:
    weight, inputs = PROBLEMS[problem]()
    stats = InputStats.of(inputs)
    hessian, _ = hessian64(inputs)
    base, method = get_method(name), get_method(name, refit=True)
    before = base.solve(weight, base.prepare(stats), pattern)
    after = method.solve(weight, method.prepare(stats), pattern)
    assert torch.equal(before.mask, after.mask)
    total = float(objective64(weight, torch.zeros_like(weight), hessian).sum())
    raised = objective64(after.weight, weight, hessian) - objective64(before.weight, weight, hessian)
    assert float(raised.max()) <= 1e-6 * total
    best = best_on_support(weight, hessian, after.mask)
    excess = objective64(after.weight, weight, hessian).sum() - objective64(best, weight, hessian).sum()
    assert float(excess) <= 1e-5 * total


def test_a_refit_lowers_the_error_of_methods_without_correction() -> None:
    weight, inputs = correlated()
    stats = InputStats.of(inputs)
    for name in ("magnitude", "wanda", "dsnot"):
        info = get_method(name, refit=True)
        record = info.solve(weight, info.prepare(stats), Unstructured(0.6)).info
        assert record.error_before_refit is not None and record.error_after_refit is not None
        assert record.error_after_refit < 0.8 * record.error_before_refit
        assert record.refit_steps > 0


@pytest.mark.parametrize("problem", LIVE)
def test_a_refit_reports_true_figures(problem: str) -> None:
    weight, inputs = PROBLEMS[problem]()
    method = Refitted(METHODS["wanda"]())
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.6))
    info = solution.info
    hessian, damping = hessian64(inputs)
    outputs = (inputs.double() @ weight.double().T).square().sum()
    error = (inputs.double() @ (solution.weight.double() - weight.double()).T).square().sum() / outputs
    assert info.error_after_refit == pytest.approx(float(error), rel=1e-3, abs=1e-6)
    assert info.damping == pytest.approx(damping, rel=1e-6)
    scale = hessian.diagonal().rsqrt()
    right = (weight.double() @ hessian) * scale * solution.mask
    masked = ((weight.double() - solution.weight.double()) @ hessian) * scale * solution.mask
    true = float((masked.norm(dim=1) / right.norm(dim=1)).max())
    assert info.refit_residual is not None and info.refit_residual <= method.tolerance
    assert true <= method.tolerance + 1e-5


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("start", ["dense", "zero", "random", "far"])
def test_the_gain_is_the_decrease_of_the_objective(start: str, steps: int) -> None:
    H, C, weight = unit_problem(23)
    mask = random_mask(8, OUT, IN, 0.4)
    begin = torch.where(mask, starts(weight)[start], 0.0)
    result = refit(H, C, mask, begin, max_steps=steps, tolerance=0.0)
    before, after = (objective64(X, weight, H.double()).sum() for X in (begin, result.weight))
    assert result.steps == steps
    assert result.gain == pytest.approx(float(before - after), rel=1e-3)


def test_without_steps_the_gain_is_zero() -> None:
    H, C, weight = unit_problem()
    mask = random_mask(5, OUT, IN)
    assert refit(H, C, mask, weight, max_steps=0, tolerance=0.0).gain == 0.0
    assert refit(H, C, torch.zeros_like(mask), weight, max_steps=5, tolerance=0.0).gain == 0.0


@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_the_minimum_gain_stops_after_the_first_smaller_step(at: int) -> None:
    H, C, weight = unit_problem(33)
    mask = random_mask(9, OUT, IN, 0.4)
    rhs_norm = (C * mask).norm(dim=1)
    totals = [refit(H, C, mask, weight, max_steps=steps, tolerance=0.0).gain for steps in range(10)]
    gains = [after - before for before, after in pairwise(totals)]
    min_gain = gains[at - 1] * (1 + 1e-9)
    X = torch.where(mask, weight, 0.0)
    result = pcg_iterations(H, C - X @ H, mask, X, rhs_norm=rhs_norm, max_steps=10, tolerance=0.0, min_gain=min_gain)
    assert result.steps == next(i for i, gain in enumerate(gains, 1) if gain <= min_gain)
    assert result.gain == pytest.approx(totals[result.steps], rel=1e-5)
    assert result.weight is X, "the answer overwrites the start"


def test_without_a_minimum_gain_all_steps_run() -> None:
    H, C, weight = unit_problem(33)
    mask = random_mask(9, OUT, IN, 0.4)
    rhs_norm = (C * mask).norm(dim=1)
    X = torch.where(mask, weight, 0.0)
    assert pcg_iterations(H, C - X @ H, mask, X, rhs_norm=rhs_norm, max_steps=10, tolerance=0.0).steps == 10
