"""Tests of the choice of groups within classes against all sets by dense least squares."""

from __future__ import annotations

import itertools

import pytest
import torch

from alps.solvers.group_choice import choose_groups
from alps.solvers.group_problem import objective
from helpers.column_problems import correlated_columns, direct_objective, optimum

CLASSES = [0, 0, 0, 1, 1, 1, 2, 2, 2]


def best_in_classes(seed: int, keep: int) -> tuple[list[int], float]:
    problem = correlated_columns(seed, 18, 5, group=2)
    members = [[3 * c + i for i in range(3)] for c in range(3)]
    sets = [
        [i for part in parts for i in part]
        for parts in itertools.product(*(itertools.combinations(groups, keep) for groups in members))
    ]
    objectives = [direct_objective(problem, kept) for kept in sets]
    best = min(range(len(sets)), key=lambda i: objectives[i])
    return sets[best], objectives[best]


@pytest.mark.parametrize("keep", [1, 2])
def test_enumeration_finds_the_optimum_within_classes(keep: int) -> None:
    kept, value = best_in_classes(1, keep)
    problem = correlated_columns(1, 18, 5, group=2)
    result = choose_groups(problem, keep, classes=CLASSES)
    assert result.kept.tolist() == kept
    assert result.objective == pytest.approx(value, rel=1e-8)
    assert result.objective == pytest.approx(objective(problem, result.kept), rel=1e-9)


def test_one_class_has_the_unconstrained_optimum() -> None:
    problem = correlated_columns(2, 24, 5, group=3)
    result = choose_groups(problem, 5)
    kept, value = optimum(problem, 5)
    assert result.kept.tolist() == list(kept)
    assert result.objective == pytest.approx(value, rel=1e-9)


def test_greedy_choice_with_exchanges_is_near_the_optimum() -> None:
    ratios = []
    for seed in range(20):
        problem = correlated_columns(seed, 18, 3, group=2, factors=4)
        greedy = choose_groups(problem, 1, classes=CLASSES, exact=False)
        assert [CLASSES[i] for i in greedy.kept.tolist()] == [0, 1, 2]
        assert greedy.objective == pytest.approx(objective(problem, greedy.kept), rel=1e-8)
        ratios.append(greedy.objective / choose_groups(problem, 1, classes=CLASSES).objective)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.05


def test_many_sets_are_not_enumerated() -> None:
    problem = correlated_columns(3, 64, 4)
    result = choose_groups(problem, 8, classes=[i % 4 for i in range(64)])
    assert [sum(i % 4 == c for i in result.kept.tolist()) for c in range(4)] == [8] * 4
    assert result.objective == pytest.approx(objective(problem, result.kept), rel=1e-9)


def test_classes_may_be_scattered_and_all_may_be_kept() -> None:
    problem = correlated_columns(4, 12, 4, group=2)
    result = choose_groups(problem, 1, classes=[7, 3, 7, 3, 7, 3])
    assert sum(i % 2 for i in result.kept.tolist()) == len(result.kept) - 1 == 1
    whole = choose_groups(problem, 3, classes=torch.tensor([7, 3, 7, 3, 7, 3]))
    assert (whole.kept.tolist(), whole.objective) == (list(range(6)), 0.0)


@pytest.mark.parametrize(("keep", "classes"), [(3, [0, 0, 1, 1, 1, 1]), (0, None), (7, None), (1, [0, 1])])
def test_impossible_choices_are_refused(keep: int, classes: list[int] | None) -> None:
    with pytest.raises(ValueError, match=f"{keep} groups cannot be kept in each class of 6 groups"):
        choose_groups(correlated_columns(5, 6, 3), keep, classes=classes)
