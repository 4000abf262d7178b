"""Tests of the sweep tableau against the matrices of its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.solvers.group_problem import GroupProblem, refit
from alps.solvers.sweep_tableau import SweepTableau
from helpers.column_problems import correlated_columns, normal


def definition(problem: GroupProblem, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return M and A of a selection by dense algebra, for the problem with a unit diagonal."""
    scale = problem.hessian.diagonal().rsqrt()
    problem = replace(problem, hessian=problem.hessian * scale * scale[:, None], target=problem.target / scale)
    H, W = problem.hessian, problem.target
    S, R = kept.nonzero().flatten(), (~kept).nonzero().flatten()
    inverse = torch.linalg.inv(H[S[:, None], S])
    M = torch.empty_like(H)
    M[S[:, None], S] = -inverse
    M[S[:, None], R] = inverse @ H[S[:, None], R]
    M[R[:, None], S] = M[S[:, None], R].T
    M[R[:, None], R] = H[R[:, None], R] - H[R[:, None], S] @ inverse @ H[S[:, None], R]
    V = torch.zeros_like(W)
    V[:, S] = refit(problem, S)
    U = (W - V) @ H
    U[:, S] = V[:, S]
    assert problem.row_weights is not None
    return M, U.T @ (problem.row_weights[:, None] * U)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 5, 64]),
    pivots=st.lists(st.integers(0, 8), max_size=20),
    start=st.integers(1, 511),
)
def test_pivots_lead_to_the_matrices_of_the_definition(seed: int, block: int, pivots: list[int], start: int) -> None:
    problem = correlated_columns(seed, 9, 4)
    kept = torch.tensor([bool(start >> i & 1) for i in range(9)])
    tableau = SweepTableau(problem, kept, block=block)
    everything = torch.arange(9)
    for column in pivots:
        expected = tableau.prices()[column]
        assert float(tableau.pivot(torch.tensor([column]))) == pytest.approx(float(expected), rel=1e-12)
        kept[column] = ~kept[column]
    assert torch.equal(tableau.kept, kept)
    M, A = definition(problem, kept)
    for actual, expected in zip(tableau.submatrices(everything, everything), (M, A), strict=True):
        off = ~torch.eye(9, dtype=torch.bool)
        torch.testing.assert_close(actual[off], expected[off], rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(tableau.sweep_diagonal, M.diagonal(), rtol=1e-8, atol=0)
    torch.testing.assert_close(tableau.energy_diagonal, A.diagonal(), rtol=1e-7, atol=1e-9 * float(A.max()))
    assert tableau.drift() < 1e-9
    for actual, expected in zip(tableau.submatrices(everything, everything), (M, A), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("removed", [0, 4])
@pytest.mark.parametrize("matrix", ["_M", "_A"])
def test_drift_sees_a_wrong_entry_and_accuracy_is_restored(matrix: str, removed: int) -> None:
    tableau = SweepTableau(correlated_columns(3, 12, 5), torch.arange(12) >= removed)
    everything = torch.arange(12)
    exact = tableau.submatrices(everything, everything)
    getattr(tableau, matrix)[6, 7] *= 1.01
    assert tableau.drift() > 1e-6
    tableau.restore_accuracy(1.0)
    assert tableau.drift() > 1e-6
    tableau.restore_accuracy(1e-8)
    assert tableau.drift() < 1e-12
    for actual, expected in zip(tableau.submatrices(everything, everything), exact, strict=True):
        assert torch.equal(actual, expected)


def test_stacks_of_submatrices_are_those_of_each_set() -> None:
    tableau = SweepTableau(correlated_columns(4, 8, 3), torch.ones(8, dtype=torch.bool))
    sets = torch.tensor([[0, 3, 5], [7, 1, 2]])
    stacked = tableau.submatrices(sets, sets)
    for i, columns in enumerate(sets):
        for both, single in zip(stacked, tableau.submatrices(columns, columns), strict=True):
            assert torch.equal(both[i], single)


def test_pivots_stay_accurate_for_nearly_equal_columns() -> None:
    inputs = normal(1, 30, 6)
    inputs[:, 1] = inputs[:, 0] + 1e-3 * inputs[:, 1]
    problem = GroupProblem(inputs.T @ inputs, normal(2, 3, 6))
    tableau = SweepTableau(problem, torch.ones(6, dtype=torch.bool), block=1)
    for column in (0, 0, 1, 1):
        tableau.pivot(torch.tensor([column]))
        exact = SweepTableau(problem, tableau.kept)
        torch.testing.assert_close(tableau.prices(), exact.prices(), rtol=1e-6, atol=0)
        both = torch.tensor([[0, 1, 3]])
        tableau.flush()
        for actual, expected in zip(tableau.submatrices(both, both), exact.submatrices(both, both), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
