"""Comparison of magnitude and Wanda with loops written from their papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats, Needs
from alps.solvers import Magnitude, Method, Wanda
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.problems import IN, OUT, PROBLEMS, correlated, huge_range

PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.93),
    SemiStructured(2, 4),
    SemiStructured(1, 4),
    SemiStructured(3, 5),
]
SQUARE = [
    "gaussian",
    "correlated",
    "dead_inputs",
    "zero_inputs",
    "huge_range",
    "rounded_weight",
    "equal_weights",
]


def best_of(scores: list[float], positions: list[int], kept: int) -> set[int]:
    """Return the `kept` positions with the largest scores; among equal scores the first."""
    return set(sorted(positions, key=lambda i: (-scores[i], i))[:kept])


def in_groups(scores: list[float], pattern: SemiStructured) -> set[int]:
    chosen: set[int] = set()
    for start in range(0, len(scores), pattern.group):
        chosen |= best_of(scores, list(range(start, start + pattern.group)), pattern.keep)
    return chosen


def as_mask(chosen: set[int], like: Tensor) -> Tensor:
    flat = [i in chosen for i in range(like.numel())]
    return torch.tensor(flat).reshape(like.shape)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", SQUARE)
def test_magnitude_matches_a_naive_loop(problem: str, pattern: Pattern) -> None:
    weight, _ = PROBLEMS[problem]()
    scores = [abs(value) for value in weight.flatten().tolist()]
    if isinstance(pattern, SemiStructured):
        chosen = in_groups(scores, pattern)
    else:
        chosen = best_of(scores, list(range(len(scores))), len(scores) - round(pattern.sparsity * len(scores)))
    solution = Magnitude().solve(weight, None, pattern)
    assert torch.equal(solution.mask, as_mask(chosen, weight))
    assert torch.equal(solution.weight, torch.where(as_mask(chosen, weight), weight, 0.0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", SQUARE)
def test_wanda_matches_a_naive_loop(problem: str, pattern: Pattern) -> None:
    weight, inputs = PROBLEMS[problem]()
    stats = InputStats.of(inputs, Needs.MOMENTS)
    method = Wanda()
    solution = method.solve(weight, method.prepare(stats), pattern)
    pruned_of_row = [IN - int(row.sum()) for row in solution.mask]
    expected = round(pattern.sparsity * OUT * IN)
    assert sum(pruned_of_row) == expected
    norms = stats.norms()
    torch.testing.assert_close(norms.double(), inputs.double().norm(dim=0), rtol=1e-5, atol=0)
    for row in range(OUT):
        # Scores are in float32 as in the method, so that ties are the same.
        scores = [float(weight[row, j].abs() * norms[j]) for j in range(IN)]
        if isinstance(pattern, SemiStructured):
            chosen = in_groups(scores, pattern)
        else:
            assert pruned_of_row[row] in (expected // OUT, -(-expected // OUT))
            chosen = best_of(scores, list(range(IN)), IN - pruned_of_row[row])
        assert torch.equal(solution.mask[row], as_mask(chosen, weight[row]))
    assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0.0))


def test_magnitude_compares_over_the_whole_matrix() -> None:
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [1.0, -2.0, 3.0, 0.5]])
    mask = Magnitude().solve(weight, None, Unstructured(0.5)).mask
    assert mask.tolist() == [[True] * 4, [False] * 4]


def test_wanda_compares_within_a_row_and_weighs_by_the_input() -> None:
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [1.0, -2.0, 3.0, 0.5]])
    inputs = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, 2.0, 4.0, 100.0]])
    method = Wanda()
    solution = method.solve(weight, method.prepare(InputStats.of(inputs, Needs.MOMENTS)), Unstructured(0.5))
    # Norms 1, 2, 5, 100: scores 9 16 35 600 and 1 4 15 50.
    assert solution.mask.tolist() == [[False, False, True, True]] * 2
    assert solution.weight.tolist() == [[0.0, 0.0, 7.0, 6.0], [0.0, 0.0, 3.0, 0.5]]


def test_magnitude_does_not_depend_on_the_inputs() -> None:
    weight, inputs = correlated()
    method: Method = Magnitude()
    other = InputStats.of(huge_range().inputs)
    first = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7))
    second = method.solve(weight, method.prepare(other), Unstructured(0.7))
    assert torch.equal(first.mask, second.mask)
    wanda = Wanda()
    third = wanda.solve(weight, wanda.prepare(InputStats.of(inputs)), Unstructured(0.7))
    fourth = wanda.solve(weight, wanda.prepare(other), Unstructured(0.7))
    assert not torch.equal(third.mask, fourth.mask)
