"""Tests of the local search by exchanges against dense least squares and against the optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from alps.solvers import group_swaps
from alps.solvers.group_elimination import eliminate
from alps.solvers.group_problem import objective
from alps.solvers.group_swaps import _Search, improve_by_swaps
from alps.solvers.sweep_tableau import SweepTableau
from helpers.column_problems import correlated_columns, direct_objective, optimum


def test_change_of_a_pair_is_the_true_one() -> None:
    problem = correlated_columns(1, 9, 4)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    kept, removed = mask.nonzero().flatten().tolist(), (~mask).nonzero().flatten().tolist()
    search = _Search(SweepTableau(problem, mask), torch.tensor([], dtype=torch.int64), 0.0)
    changes = search.changes(torch.tensor(kept), torch.tensor(removed))
    before = direct_objective(problem, kept)
    for i, p in enumerate(kept):
        for j, q in enumerate(removed):
            after = direct_objective(problem, sorted({*kept, q} - {p}))
            assert float(changes[i, j]) == pytest.approx(after - before, rel=1e-7, abs=1e-9 * before)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_swaps_are_within_two_per_cent_of_the_optimum_on_average(count: int) -> None:
    ratios, plain = [], []
    for seed in range(count):
        problem = correlated_columns(7 * seed, 8 + seed % 3, 1 + seed % 4)
        keep = problem.groups // 2
        start = eliminate(problem, keep)
        result = improve_by_swaps(problem, start.kept)
        best = optimum(problem, keep)[1]
        assert best * (1 - 1e-9) <= result.objective <= start.objective * (1 + 1e-9)
        assert (result.swaps == 0) == torch.equal(result.kept, start.kept)
        ratios.append(result.objective / best)
        plain.append(start.objective / best)
    assert sum(ratios) / count < 1.02
    assert sum(ratios) < sum(plain)


@pytest.mark.parametrize("candidates", [1, 8, 64])
def test_no_exchange_gains_at_the_end(candidates: int) -> None:
    problem = correlated_columns(3, 40, 5, factors=4)
    result = improve_by_swaps(problem, torch.arange(20), candidates=candidates)
    assert result.swaps > 5
    assert result.before == pytest.approx(direct_objective(problem, range(20)), rel=1e-7)
    assert result.objective == pytest.approx(direct_objective(problem, result.kept), rel=1e-7)
    kept = set(result.kept.tolist())
    neighbours = [sorted({*kept, q} - {p}) for p in kept for q in set(range(40)) - kept]
    assert min(objective(problem, torch.tensor(each)) for each in neighbours) > result.objective * (1 - 1e-6)


def test_a_limit_stops_the_search_at_a_better_selection() -> None:
    problem = correlated_columns(3, 40, 5, factors=4)
    objectives = [improve_by_swaps(problem, torch.arange(20), limit=limit).objective for limit in range(4)]
    assert objectives[0] == objective(problem, torch.arange(20))
    assert all(after < before for before, after in itertools.pairwise(objectives))
    assert improve_by_swaps(problem, torch.arange(20), limit=3).swaps == 3


def test_protected_columns_stay_and_results_are_the_same_to_the_bit() -> None:
    problem = correlated_columns(3, 40, 5, factors=4)
    moved = set(range(20)) - set(improve_by_swaps(problem, torch.arange(20)).kept.tolist())
    protected = sorted(moved)[:3]
    first, second = (improve_by_swaps(problem, torch.arange(20), protected=protected) for _ in range(2))
    assert set(protected) <= set(first.kept.tolist())
    assert torch.equal(first.kept, second.kept)
    assert first.objective == second.objective
    assert improve_by_swaps(problem, torch.arange(20), protected=range(20)).swaps == 0


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_a_scaled_gram_leads_to_the_same_exchanges(factor: float) -> None:
    problem = correlated_columns(3, 40, 5, factors=4)
    expected = improve_by_swaps(problem, torch.arange(20))
    scaled = improve_by_swaps(replace(problem, hessian=problem.hessian * factor), torch.arange(20))
    assert torch.equal(scaled.kept, expected.kept)
    assert scaled.swaps == expected.swaps
    assert scaled.objective == pytest.approx(factor * expected.objective, rel=1e-9)


def test_the_start_is_returned_if_the_recomputed_objective_is_not_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_swaps, "objective", lambda _, kept: 1.0 + float(not torch.equal(kept, torch.arange(20))))
    result = improve_by_swaps(correlated_columns(3, 40, 5, factors=4), torch.arange(20))
    assert result.kept.tolist() == list(range(20))
    assert (result.objective, result.before, result.swaps) == (1.0, 1.0, 0)


def test_nothing_to_exchange_and_groups_of_several_columns() -> None:
    problem = correlated_columns(4, 8, 3)
    result = improve_by_swaps(problem, torch.arange(8))
    assert (result.swaps, result.objective, result.before) == (0, 0.0, 0.0)
    with pytest.raises(ValueError, match="use choose_groups"):
        improve_by_swaps(correlated_columns(4, 8, 3, group=2), torch.arange(2))
