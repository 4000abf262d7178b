"""Tests of backward elimination: prices against dense least squares, order, blocking and special columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alps.core.errors import SolveFailed
from alps.solvers import group_elimination
from alps.solvers.group_elimination import eliminate, full_tableau, removal_costs
from alps.solvers.group_problem import GroupProblem, objective
from helpers.column_problems import correlated_columns, direct_objective, normal, optimum


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), group=st.integers(1, 3), batch=st.integers(1, 3), keep=st.integers(1, 8))
def test_every_price_is_the_true_increase(seed: int, group: int, batch: int, keep: int) -> None:
    problem = correlated_columns(seed, 8 * group, 4, group=group)
    result = eliminate(problem, keep, batch=batch)
    left, before = list(range(8)), 0.0
    for step, (removed, price) in enumerate(zip(result.removed.tolist(), result.prices.tolist(), strict=True)):
        increases = {i: direct_objective(problem, [j for j in left if j != i]) - before for i in left}
        assert price == pytest.approx(increases[removed], rel=1e-7)
        if step % batch == 0:
            assert min(increases, key=lambda i: increases[i]) == removed
        left.remove(removed)
        before += increases[removed]
    assert result.kept.tolist() == left
    assert result.objective == pytest.approx(before, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("n", "group", "batch"), [(96, 1, 1), (96, 1, 10), (96, 4, 1), (96, 4, 2)])
def test_prices_add_up_to_the_objective(n: int, group: int, batch: int) -> None:
    problem = correlated_columns(5, n, 20, group=group)
    result = eliminate(problem, n // group // 2, batch=batch)
    assert float(result.prices.sum()) == pytest.approx(objective(problem, result.kept), rel=1e-9)
    assert result.objective == pytest.approx(objective(problem, result.kept), rel=1e-9)
    assert sorted([*result.kept.tolist(), *result.removed.tolist()]) == list(range(n // group))


@pytest.mark.parametrize("block", [2, 7, 64, 1000])
def test_blocking_does_not_change_the_selection(block: int) -> None:
    problem = correlated_columns(6, 160, 30)
    blocked, unblocked = eliminate(problem, 40, block=block), eliminate(problem, 40, block=1)
    assert torch.equal(blocked.removed, unblocked.removed)
    torch.testing.assert_close(blocked.prices, unblocked.prices, rtol=1e-9, atol=0)


def test_results_are_the_same_to_the_bit() -> None:
    problem = correlated_columns(7, 64, 10)
    first, second = eliminate(problem, 40), eliminate(problem, 40)
    assert torch.equal(first.removed, second.removed)
    assert torch.equal(first.prices, second.prices)


def test_permuted_columns_are_removed_in_the_permuted_order() -> None:
    problem = correlated_columns(8, 60, 10)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    permuted = GroupProblem(problem.hessian[order[:, None], order], problem.target[:, order], problem.row_weights)
    assert torch.equal(order[eliminate(permuted, 20).removed], eliminate(problem, 20).removed)


def test_columns_of_any_scale_have_the_same_prices() -> None:
    problem = correlated_columns(8, 60, 10)
    scale = torch.pow(10, 6 * (torch.rand(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5))
    scaled = replace(problem, hessian=problem.hessian * scale * scale[:, None], target=problem.target / scale)
    expected, result = eliminate(problem, 20), eliminate(scaled, 20)
    assert torch.equal(result.removed, expected.removed)
    torch.testing.assert_close(result.prices, expected.prices, rtol=1e-9, atol=0)


def test_price_depends_on_row_weights() -> None:
    problem = correlated_columns(9, 40, 6)
    unweighted = eliminate(replace(problem, row_weights=None), 20)
    assert torch.equal(eliminate(replace(problem, row_weights=torch.ones(6)), 20).removed, unweighted.removed)
    assert not torch.equal(eliminate(problem, 20).removed, unweighted.removed)


def test_ties_are_broken_by_the_lowest_index() -> None:
    problem = GroupProblem(torch.eye(12, dtype=torch.float64), torch.ones(2, 12), group=2)
    assert eliminate(problem, 2).removed.tolist() == [0, 1, 2, 3]
    assert eliminate(problem, 2, batch=3).removed.tolist() == [0, 1, 2, 3]
    assert eliminate(problem, 2).prices.tolist() == [4.0] * 4


def test_columns_without_weight_and_dead_ones_go_first() -> None:
    problem = correlated_columns(10, 12, 4)
    problem.target[:, 5] = 0.0
    problem.hessian[8] = problem.hessian[:, 8] = 0.0
    problem.hessian[8, 8] = 1e6
    dead = replace(problem, dead=torch.arange(12) == 8)
    result = eliminate(dead, 9)
    assert result.removed[:2].tolist() == [5, 8]
    assert result.prices[:2].tolist() == [0.0, 0.0]
    assert result.prices[2] > 0
    assert 8 in eliminate(problem, 9).kept.tolist()


def test_protected_groups_are_kept() -> None:
    problem = correlated_columns(11, 20, 4, group=2)
    cheapest = eliminate(problem, 7).removed
    result = eliminate(problem, 3, protected=cheapest)
    assert result.kept.tolist() == cheapest.sort().values.tolist()


def test_elimination_is_near_the_optimum() -> None:
    ratios = []
    for seed in range(20):
        problem = correlated_columns(seed, 10, 4)
        ratios.append(eliminate(problem, 5).objective / optimum(problem, 5)[1])
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.15


def test_costs_of_sets_are_their_objectives() -> None:
    problem = correlated_columns(12, 9, 4)
    sets = torch.tensor([[0, 1, 2], [8, 4, 6]])
    costs = removal_costs(full_tableau(problem), sets)
    expected = [direct_objective(problem, problem.others(removed)) for removed in sets]
    torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_tableau_that_is_built_again_leads_to_the_same_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = correlated_columns(13, 80, 10)
    expected = eliminate(problem, 30)
    monkeypatch.setattr(group_elimination, "_CHECK_INTERVAL", 16)
    monkeypatch.setattr(group_elimination, "_TOLERANCE", 0.0)
    result = eliminate(problem, 30)
    assert torch.equal(result.removed, expected.removed)
    assert not torch.equal(result.prices, expected.prices)
    torch.testing.assert_close(result.prices, expected.prices, rtol=1e-9, atol=0)


def test_impossible_numbers_and_grams_are_refused() -> None:
    problem = correlated_columns(14, 6, 3)
    for keep in (0, 7):
        with pytest.raises(ValueError, match=f"{keep} of 6 groups cannot be kept"):
            eliminate(problem, keep)
    with pytest.raises(ValueError, match="with 3 protected"):
        eliminate(problem, 2, protected=[1, 2, 3])
    with pytest.raises(SolveFailed, match="not positive definite"):
        eliminate(replace(problem, hessian=normal(1, 6, 6) * 0), 3)


def test_all_kept_removes_nothing() -> None:
    result = eliminate(correlated_columns(15, 6, 3), 6)
    assert result.kept.tolist() == list(range(6))
    assert len(result.removed) == len(result.prices) == 0
    assert result.objective == 0.0
