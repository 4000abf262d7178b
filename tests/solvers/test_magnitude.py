"""Comparison of magnitude pruning with a loop."""

from __future__ import annotations

import pytest
import torch

from alps.core.statistics import InputStats
from alps.solvers import Magnitude, Method
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.naive_selection import PATTERNS, SQUARE, as_mask, best_in_groups, best_of
from helpers.problems import PROBLEMS, correlated, huge_range


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", SQUARE)
def test_magnitude_matches_a_naive_loop(problem: str, pattern: Pattern) -> None:
    weight, _ = PROBLEMS[problem]()
    scores = [abs(value) for value in weight.flatten().tolist()]
    if isinstance(pattern, SemiStructured):
        chosen = best_in_groups(scores, pattern)
    else:
        chosen = best_of(scores, list(range(len(scores))), len(scores) - round(pattern.sparsity * len(scores)))
    solution = Magnitude().solve(weight, None, pattern)
    assert torch.equal(solution.mask, as_mask(chosen, weight))
    assert torch.equal(solution.weight, torch.where(as_mask(chosen, weight), weight, 0.0))


def test_magnitude_compares_over_the_whole_matrix() -> None:
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [1.0, -2.0, 3.0, 0.5]])
    mask = Magnitude().solve(weight, None, Unstructured(0.5)).mask
    assert mask.tolist() == [[True] * 4, [False] * 4]


def test_magnitude_does_not_depend_on_the_inputs() -> None:
    weight, inputs = correlated()
    method: Method = Magnitude()
    other = InputStats.of(huge_range().inputs)
    first = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7))
    second = method.solve(weight, method.prepare(other), Unstructured(0.7))
    assert torch.equal(first.mask, second.mask)
