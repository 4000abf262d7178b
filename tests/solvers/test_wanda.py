"""Comparison of Wanda with a loop written from its paper."""

from __future__ import annotations

import pytest
import torch

from alps.core.statistics import InputStats, Needs
from alps.solvers import Wanda
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.naive_selection import PATTERNS, SQUARE, as_mask, best_in_groups, best_of
from helpers.problems import IN, OUT, PROBLEMS, correlated, huge_range


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
            chosen = best_in_groups(scores, pattern)
        else:
            assert pruned_of_row[row] in (expected // OUT, -(-expected // OUT))
            chosen = best_of(scores, list(range(IN)), IN - pruned_of_row[row])
        assert torch.equal(solution.mask[row], as_mask(chosen, weight[row]))
    assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0.0))


def test_wanda_compares_within_a_row_and_weighs_by_the_input() -> None:
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [1.0, -2.0, 3.0, 0.5]])
    inputs = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, 2.0, 4.0, 100.0]])
    method = Wanda()
    solution = method.solve(weight, method.prepare(InputStats.of(inputs, Needs.MOMENTS)), Unstructured(0.5))
    # Norms 1, 2, 5, 100: scores 9 16 35 600 and 1 4 15 50.
    assert solution.mask.tolist() == [[False, False, True, True]] * 2
    assert solution.weight.tolist() == [[0.0, 0.0, 7.0, 6.0], [0.0, 0.0, 3.0, 0.5]]


def test_wanda_depends_on_the_inputs() -> None:
    weight, inputs = correlated()
    method = Wanda()
    masks = [
        method.solve(weight, method.prepare(InputStats.of(rows)), Unstructured(0.7)).mask
        for rows in (inputs, huge_range().inputs)
    ]
    assert not torch.equal(*masks)
