"""Comparison of DSnoT with a loop over rows in plain Python, written from the paper's two criteria."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import DSnoT, Wanda
from alps.solvers.base import Status
from alps.solvers.hessian import inverse_factor
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import IN, OUT, PROBLEMS, correlated_inputs, normal

PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4), SemiStructured(1, 4)]
NAMES = ["shifted", "gaussian", "correlated", "dead_inputs", "huge_range", "one_output"]


def problem_of(name: str) -> tuple[Tensor, Tensor]:
    """Return a problem of the table, or one whose inputs have means far from zero, on which DSnoT swaps weights."""
    if name == "shifted":
        return normal(60, OUT, IN), correlated_inputs(61, 200, IN) + 2 * normal(65, IN)
    return PROBLEMS[name]()


def initial_mask(weight: Tensor, stats: InputStats, pattern: Pattern, initial: str) -> Tensor:
    if initial == "wanda":
        return keep_largest(weight.abs() * stats.norms(), pattern, scope="row")
    diagonal = inverse_factor(stats, 0.01).upper.diagonal()
    return keep_largest(weight.square() / diagonal.square(), pattern, scope="row")


def swapped(
    row: list[float],
    kept: list[bool],
    mean: list[float],
    variance: list[float],
    norms: list[float],
    pattern: Pattern,
    threshold: float,
    cycles: int,
) -> list[bool]:
    """Swap weights of one row while |eps| is above the threshold and falls without changing sign."""
    mask, moved = list(kept), set[int]()
    A = [w * m for w, m in zip(row, mean, strict=True)]
    columns = range(len(row))
    for _ in range(cycles):
        eps = sum(A[j] for j in columns if not mask[j])
        if abs(eps) <= threshold:
            break
        sign = 1 if eps > 0 else -1
        pruned = [j for j in columns if not mask[j] and j not in moved]
        if not pruned:
            break
        grow = max(pruned, key=lambda j: sign * A[j] / variance[j])
        candidates = [j for j in columns if mask[j] and j not in moved]
        if isinstance(pattern, SemiStructured):
            candidates = [j for j in candidates if j // pattern.group == grow // pattern.group]
        else:
            candidates = [j for j in candidates if sign * A[j] < 0]
        if not candidates:
            break
        prune = min(candidates, key=lambda j: abs(row[j]) * norms[j])
        after = eps - A[grow] + A[prune]
        if after * sign <= 0 or abs(after) >= abs(eps):
            break
        mask[grow], mask[prune] = True, False
        moved |= {grow, prune}
    return mask


@pytest.mark.parametrize("initial", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", NAMES)
def test_masks_match_a_naive_loop(problem: str, pattern: Pattern, initial: str) -> None:
    weight, inputs = problem_of(problem)
    stats = InputStats.of(inputs)
    method = DSnoT() if initial == "wanda" else DSnoT(initial="sparsegpt")
    solution = method.solve(weight, method.prepare(stats), pattern)
    exact = inputs.double()
    variance = exact.var(dim=0, correction=0)
    variance = variance.clamp_min(1e-6 * float(exact.square().mean()))
    mean, norms = exact.mean(dim=0), exact.norm(dim=0)
    start = initial_mask(weight, stats, pattern, initial)
    for row in range(weight.shape[0]):
        expected = swapped(
            weight[row].double().tolist(),
            start[row].tolist(),
            mean.tolist(),
            variance.tolist(),
            norms.tolist(),
            pattern,
            method.threshold,
            method.max_cycles,
        )
        assert solution.mask[row].tolist() == expected, row
    assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0.0))


@pytest.mark.parametrize("initial", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_expected_error_of_no_row_rises(pattern: Pattern, initial: str) -> None:
    weight, inputs = problem_of("shifted")
    stats = InputStats.of(inputs)
    method = DSnoT() if initial == "wanda" else DSnoT(initial="sparsegpt")
    mask = method.solve(weight, method.prepare(stats), pattern).mask
    start = initial_mask(weight, stats, pattern, initial)
    A = weight.double() * inputs.double().mean(dim=0)
    before = torch.where(start, 0.0, A).sum(dim=1)
    after = torch.where(mask, 0.0, A).sum(dim=1)
    assert bool((after.abs() <= before.abs() + 1e-5).all())
    assert bool(((after * before >= 0) | (after.abs() < 1e-4)).all()), "no row crosses zero"
    assert float(after.abs().sum()) < 0.9 * float(before.abs().sum()), "there was something to gain"
    assert torch.equal(mask.sum(dim=1), start.sum(dim=1))


def test_the_first_cycles_are_those_of_a_longer_run() -> None:
    weight, inputs = problem_of("shifted")
    stats = InputStats.of(inputs)
    start = initial_mask(weight, stats, Unstructured(0.5), "wanda")
    A = weight.double() * inputs.double().mean(dim=0)
    last = torch.where(start, 0.0, A).sum(dim=1).abs()
    for cycles in (1, 2):
        method = DSnoT(max_cycles=cycles)
        solution = method.solve(weight, method.prepare(stats), Unstructured(0.5))
        swaps = (solution.mask ^ start).sum(dim=1)
        assert int(swaps.max()) == 2 * cycles, "one swap a cycle in the rows that move"
        assert solution.info.iterations == cycles and solution.info.status is Status.MAX_ITERATIONS
        error = torch.where(solution.mask, 0.0, A).sum(dim=1).abs()
        assert bool((error <= last + 1e-5).all()) and float(error.sum()) < float(last.sum())
        last = error


def test_no_swap_below_the_threshold_or_without_cycles() -> None:
    weight, inputs = problem_of("shifted")
    stats = InputStats.of(inputs)
    wanda = Wanda()
    plain = wanda.solve(weight, wanda.prepare(stats), Unstructured(0.5))
    for method in (DSnoT(threshold=1e6), DSnoT(max_cycles=0)):
        solution = method.solve(weight, method.prepare(stats), Unstructured(0.5))
        assert torch.equal(solution.mask, plain.mask)
    moved = DSnoT().solve(weight, DSnoT().prepare(stats), Unstructured(0.5))
    assert not torch.equal(moved.mask, plain.mask)


def test_inputs_of_mean_zero_keep_the_initial_mask() -> None:
    weight, inputs = problem_of("shifted")
    balanced = torch.cat([inputs, -inputs])
    stats = InputStats.of(balanced)
    method = DSnoT()
    solution = method.solve(weight, method.prepare(stats), Unstructured(0.5))
    assert torch.equal(solution.mask, initial_mask(weight, stats, Unstructured(0.5), "wanda"))
    assert solution.info.iterations == 1 and solution.info.status is Status.CONVERGED
