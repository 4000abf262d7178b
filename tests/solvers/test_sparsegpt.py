"""Comparison of SparseGPT with optimal brain surgery that computes a new inverse for every column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import SparseGPT
from alps.solvers.patterns import SemiStructured, Unstructured
from helpers.problems import IN, OUT, PROBLEMS, correlated, hessian64, normal, objective64

NAMES = ["gaussian", "correlated", "dead_inputs", "few_tokens", "one_output"]


def later_inverse(hessian: Tensor, column: int) -> Tensor:
    """Return (H[j:, j:])^{-1}, the inverse without the columns before j."""
    inverse: Tensor = torch.linalg.inv(hessian[column:, column:])
    return inverse


def largest(scores: list[tuple[float, int]], kept: int) -> set[int]:
    return {position for _, position in sorted(scores, key=lambda entry: (-entry[0], entry[1]))[:kept]}


def block_choice(W: Tensor, hessian: Tensor, start: int, stop: int, total: int, pattern: Unstructured) -> set[int]:
    """Return the positions (row * in + column) to keep in columns start..stop for the current weights."""
    columns = W.shape[1]
    expected = round(pattern.sparsity * W.numel())
    pruned = expected * stop // columns - total
    scores = []
    for row in range(W.shape[0]):
        for j in range(start, stop):
            pivot = float(later_inverse(hessian, j)[0, 0])
            scores.append((float(W[row, j]) ** 2 / pivot, row * columns + j))
    return largest(scores, len(scores) - pruned)


def naive(weight: Tensor, hessian: Tensor, pattern: Unstructured | SemiStructured, block: int) -> tuple[Tensor, Tensor]:
    """Return weights and mask of optimal brain surgery in float64."""
    W = weight.double().clone()
    rows, columns = W.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if isinstance(pattern, Unstructured):
            if j % block == 0:
                stop = min(j + block, columns)
                total = int((~mask[:, :j]).sum())
                for position in block_choice(W, hessian, j, stop, total, pattern):
                    mask[position // columns, position % columns] = True
        elif j % pattern.group == 0:
            pivots = [float(later_inverse(hessian, j + i)[0, 0]) for i in range(pattern.group)]
            for row in range(rows):
                scores = [(float(W[row, j + i]) ** 2 / pivots[i], j + i) for i in range(pattern.group)]
                for position in largest(scores, pattern.keep):
                    mask[row, position] = True
        inverse = later_inverse(hessian, j)
        for row in range(rows):
            if not mask[row, j]:
                W[row, j:] -= W[row, j] / inverse[0, 0] * inverse[0]
                W[row, j] = 0.0
    return W, mask


@pytest.mark.parametrize("block", [8, 16, 12, 128])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("problem", NAMES)
def test_unstructured_pruning_matches_optimal_brain_surgery(
    problem: str, pattern: Unstructured | SemiStructured, block: int
) -> None:
    weight, inputs = PROBLEMS[problem]()
    method = SparseGPT(block=block)
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), pattern)
    expected, mask = naive(weight, hessian64(inputs)[0], pattern, block)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [8, 10, 128])
@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(3, 5)], ids=str)
@pytest.mark.parametrize("problem", NAMES)
def test_group_pruning_matches_optimal_brain_surgery(problem: str, pattern: SemiStructured, block: int) -> None:
    weight, inputs = PROBLEMS[problem]()
    method = SparseGPT(block=block)
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), pattern)
    expected, mask = naive(weight, hessian64(inputs)[0], pattern, block)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 3, 7, 8, 39, 40, 128])
@pytest.mark.parametrize("sparsity", [0.01, 0.33, 0.5, 0.7, 0.999])
def test_counts_of_blocks_sum_to_the_exact_count(block: int, sparsity: float) -> None:
    weight, inputs = correlated()
    method = SparseGPT(block=block)
    mask = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(sparsity)).mask
    assert int((~mask).sum()) == round(sparsity * OUT * IN)
    for start in range(0, IN, block):
        width = min(block, IN - start)
        pruned = int((~mask[:, start : start + width]).sum())
        assert abs(pruned - round(sparsity * OUT * IN) * width / IN) < 1


@pytest.mark.parametrize("block", [8, 16, 20])
def test_the_block_size_does_not_change_group_pruning(block: int) -> None:
    """Check that the lazy update, which only changes the order of sums, gives the same masks."""
    weight, inputs = correlated()
    stats = InputStats.of(inputs)
    small, whole = SparseGPT(block=block), SparseGPT(block=IN)
    first = small.solve(weight, small.prepare(stats), SemiStructured(2, 4))
    second = whole.solve(weight, whole.prepare(stats), SemiStructured(2, 4))
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)


def test_white_inputs_do_not_change_kept_weights() -> None:
    """Use a diagonal Hessian, with which no correction is possible and the scores are |W_ij|^2 H_jj."""
    weight = normal(1, 8, 16)
    inputs = torch.diag(torch.linspace(1, 2, 16))
    method = SparseGPT(block=16)
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.5))
    torch.testing.assert_close(solution.weight[solution.mask], weight[solution.mask], rtol=1e-6, atol=0)
    scores = weight.double().square() * hessian64(inputs)[0].diagonal()
    assert float(scores[solution.mask].min()) > float(scores[~solution.mask].max())


def test_corrections_lower_the_error_on_correlated_inputs() -> None:
    weight, inputs = correlated()
    method = SparseGPT()
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.5))
    hessian, _ = hessian64(inputs)
    uncorrected = torch.where(solution.mask, weight, 0.0)
    corrected = float(objective64(solution.weight, weight, hessian).sum())
    assert corrected < 0.3 * float(objective64(uncorrected, weight, hessian).sum())


def test_more_damping_moves_kept_weights_less() -> None:
    weight, inputs = correlated()
    moved = []
    for damping in (0.01, 1.0, 100.0):
        method = SparseGPT(damping=damping)
        solution = method.solve(weight, method.prepare(InputStats.of(inputs)), SemiStructured(2, 4))
        moved.append(float((solution.weight - weight)[solution.mask].norm()))
    assert moved[0] > 2 * moved[1] > 20 * moved[2]
