"""Tests of the refit and the objective of a column selection against dense least squares on explicit inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alps.core.errors import SolveFailed
from alps.solvers.group_problem import GroupProblem, objective, refit
from helpers.column_problems import correlated_columns, direct_objective, normal

KEPT = torch.tensor([0, 2, 3, 7, 8])


@pytest.mark.parametrize("dense_target", [False, True])
@pytest.mark.parametrize("row_weighted", [False, True])
def test_refit_equals_least_squares_on_explicit_inputs(dense_target: bool, row_weighted: bool) -> None:
    n, m, tokens, damping = 9, 4, 50, 0.7
    inputs, token_weights, weight = normal(1, tokens, n), torch.exp(normal(2, tokens)), normal(3, m, n)
    row_weights = torch.exp(normal(4, m)) if row_weighted else torch.ones(m, dtype=torch.float64)
    outputs = (inputs + 0.3 * normal(5, tokens, n) if dense_target else inputs) @ weight.T
    weighted = inputs * token_weights[:, None]
    hessian = weighted.T @ inputs + damping * torch.eye(n, dtype=torch.float64)
    target = torch.linalg.solve(hessian, weighted.T @ outputs + damping * weight.T).T
    problem = GroupProblem(hessian, target, row_weights if row_weighted else None)

    # Rows of the stacked system: tokens, then the damping towards the dense weight, removed columns included.
    damped = damping**0.5 * torch.eye(n, dtype=torch.float64)
    system = torch.cat([inputs * token_weights.sqrt()[:, None], damped])
    right = torch.cat([outputs * token_weights.sqrt()[:, None], damped @ weight.T])
    values = torch.linalg.lstsq(system[:, KEPT], right, driver="gelsd").solution
    torch.testing.assert_close(refit(problem, KEPT), values.T, rtol=1e-9, atol=1e-12)

    def squares(kept: torch.Tensor) -> float:
        fitted = torch.linalg.lstsq(system[:, kept], right, driver="gelsd").solution
        return float(((system[:, kept] @ fitted - right).square() * row_weights).sum())

    assert objective(problem, KEPT) == pytest.approx(squares(KEPT) - squares(torch.arange(n)), rel=1e-9)


@pytest.mark.parametrize("group", [1, 3])
def test_refit_is_stationary_and_the_objective_is_that_of_the_refit(group: int) -> None:
    problem = correlated_columns(7, 15 * group, 6, group=group)
    kept = torch.tensor([0, 1, 4, 5, 9, 13])
    S = problem.columns(kept)
    V = refit(problem, kept)
    correlation = (problem.target @ problem.hessian)[:, S]
    assert float((V @ problem.hessian[S[:, None], S] - correlation).norm() / correlation.norm()) < 1e-9
    delta = -problem.target.clone()
    delta[:, S] += V
    assert problem.row_weights is not None
    energy = float((delta @ problem.hessian * delta * problem.row_weights[:, None]).sum())
    assert objective(problem, kept) == pytest.approx(energy, rel=1e-9)
    assert objective(problem, kept) == pytest.approx(direct_objective(problem, kept), rel=1e-9)


def test_all_kept_changes_nothing() -> None:
    problem = correlated_columns(8, 6, 3)
    everything = torch.arange(6)
    assert torch.equal(refit(problem, everything), problem.target)
    assert objective(problem, everything) == 0.0


def test_dead_columns_cost_nothing_and_keep_their_values() -> None:
    problem = correlated_columns(9, 6, 3)
    problem.hessian[2] = problem.hessian[:, 2] = 0.0
    problem.hessian[2, 2] = 5.0
    dead = replace(problem, dead=torch.arange(6) == 2)
    without = torch.tensor([0, 1, 3, 4, 5])
    assert objective(dead, without) == 0.0
    assert objective(problem, without) > 1.0
    assert torch.equal(refit(dead, torch.tensor([1, 2]))[:, 1], problem.target[:, 2])


def test_float32_weights_are_solved_in_float64() -> None:
    problem = correlated_columns(10, 10, 3)
    single = replace(problem, target=problem.target.float(), row_weights=torch.ones(3))
    double = replace(single, target=single.target.double(), row_weights=None)
    assert refit(single, KEPT).dtype == torch.float64
    assert torch.equal(refit(single, KEPT), refit(double, KEPT))
    assert objective(single, KEPT) == objective(double, KEPT)


def test_unusable_grams_are_refused() -> None:
    indefinite = GroupProblem(-torch.eye(4, dtype=torch.float64), torch.ones(2, 4))
    for solve in (refit, objective):
        with pytest.raises(SolveFailed, match="not positive definite: raise the damping"):
            solve(indefinite, torch.tensor([0, 1]))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(SolveFailed, match="NaN or infinite"):
            GroupProblem(torch.eye(4, dtype=torch.float64), torch.full((2, 4), bad))
        with pytest.raises(SolveFailed, match="NaN or infinite"):
            GroupProblem(torch.full((4, 4), bad, dtype=torch.float64), torch.ones(2, 4))


def test_shapes_and_dtypes_are_checked() -> None:
    with pytest.raises(ValueError, match="no groups of 3 columns"):
        GroupProblem(torch.eye(4, dtype=torch.float64), torch.ones(2, 4), group=3)
    with pytest.raises(ValueError, match="no groups of 1 columns"):
        GroupProblem(torch.eye(4, dtype=torch.float64), torch.ones(4, 2))
    with pytest.raises(ValueError, match="must be float64, not torch"):
        GroupProblem(torch.eye(4), torch.ones(2, 4))
