"""Tests of `MaskedPattern`: zeros stay zero with every method, and counts are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import Alps, get_method
from alps.solvers.base import Solution, Status
from alps.solvers.patterns import (
    MaskedPattern,
    Pattern,
    SemiStructured,
    Unstructured,
    keep_largest,
    restrict_to_nonzeros,
)
from alps.solvers.topk import redistribute
from helpers import methods
from helpers.methods import METHOD_NAMES, PATTERNS, bits, cached_problem
from helpers.problems import PROBLEMS, correlated_inputs, hessian64, normal, objective64, random_mask

many = settings(max_examples=150)


def solve(name: str, weight: Tensor, inputs: Tensor, pattern: Pattern) -> Solution:
    return methods.solve(name, weight, InputStats.of(inputs), pattern)


def random_mask_like(seed: int, weight: Tensor, share: float) -> Tensor:
    """Return a seeded mask of the weight's shape."""
    return random_mask(seed, weight.shape[0], weight.shape[1], share)


def expected_kept(allowed: Tensor, pattern: Unstructured | SemiStructured) -> int:
    """Count the kept entries one by one."""
    if isinstance(pattern, Unstructured):
        return min(allowed.numel() - round(pattern.sparsity * allowed.numel()), int(allowed.sum()))
    groups = [group for row in allowed.tolist() for group in zip(*[iter(row)] * pattern.group, strict=True)]
    return sum(min(sum(group), pattern.keep) for group in groups)


@pytest.mark.parametrize("aims_elsewhere", [False, True], ids=["zeros in the aim", "none in the aim"])
@pytest.mark.parametrize("share", [0.75, 0.4, 0.02])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_zeros_stay_zero_and_counts_are_exact(name: str, share: float, aims_elsewhere: bool) -> None:
    """Include dense targets, which are not zero at the zeros of the weight."""
    for problem in ("gaussian", "correlated", "dead_inputs", "rounded_weight", "equal_weights", "few_tokens"):
        weight, inputs = cached_problem(problem)
        allowed = random_mask_like(len(problem), weight, share)
        aim = weight if aims_elsewhere else weight * allowed
        for base in PATTERNS:
            pattern = restrict_to_nonzeros(base.base, weight * allowed)
            assert isinstance(pattern, MaskedPattern) and torch.equal(pattern.allowed, allowed)
            result = solve(name, aim, inputs, pattern)
            assert not bool((result.mask & ~allowed).any()), (problem, str(base))
            assert not bool(bits(result.weight)[~result.mask].any())
            assert int(result.mask.sum()) == expected_kept(allowed, base.base) == pattern.kept
            if isinstance(base, SemiStructured):
                groups = [mask.reshape(-1, base.group).sum(dim=1) for mask in (result.mask, allowed)]
                assert torch.equal(groups[0], groups[1].clamp_max(base.keep))
            assert pattern.is_satisfied == torch.equal(result.mask, allowed)
            assert bool(torch.isfinite(result.weight).all())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_mask_that_allows_everything_changes_no_bit(name: str) -> None:
    for problem in PROBLEMS:
        weight, inputs = cached_problem(problem)
        for base in PATTERNS:
            if not base.fits(weight.shape[1]):
                continue
            wrapped = MaskedPattern(base.base, torch.ones_like(weight, dtype=torch.bool))
            plain, result = solve(name, weight, inputs, base), solve(name, weight, inputs, wrapped)
            if problem == "zero_weight" and wrapped.kept < weight.numel():
                assert not bool(result.weight.any())
            assert torch.equal(bits(plain.weight), bits(result.weight)) and torch.equal(plain.mask, result.mask)
    dense = cached_problem("gaussian").weight
    assert restrict_to_nonzeros(Unstructured(0.5), dense) == Unstructured(0.5)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("base", [Unstructured(0.5), Unstructured(0.0), SemiStructured(2, 4)], ids=str)
def test_a_weight_with_enough_zeros_is_unchanged(name: str, base: Unstructured | SemiStructured) -> None:
    weight, inputs = cached_problem("correlated")
    sparse = weight * keep_largest(weight.abs(), base if base.sparsity else Unstructured(0.3))
    for aim in (sparse, sparse * random_mask_like(1, weight, 0.8)):
        result = solve(name, aim, inputs, restrict_to_nonzeros(base, aim))
        assert result.info.status is Status.UNCHANGED
        assert torch.equal(result.weight, aim) and torch.equal(result.mask, aim != 0)


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "wanda+refit"])
@pytest.mark.parametrize("base", [Unstructured(0.7), SemiStructured(1, 4)], ids=str)
def test_methods_choose_better_entries_than_magnitude(name: str, base: Unstructured | SemiStructured) -> None:
    weight, inputs = cached_problem("correlated")
    sparse = weight * random_mask_like(7, weight, 0.6)
    hessian, _ = hessian64(inputs)
    pattern = restrict_to_nonzeros(base, sparse)
    weights = [solve(method, sparse, inputs, pattern).weight for method in (name, "magnitude")]
    errors = [objective64(pruned, sparse, hessian).sum() for pruned in weights]
    assert 0 < float(errors[0]) < 0.8 * float(errors[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", [Unstructured(0.7), Unstructured(0.45), SemiStructured(2, 4)], ids=str)
def test_large_layers_keep_their_zeros(base: Unstructured | SemiStructured, precision: str) -> None:
    """Use at least 2^16 weights, for which ADMM projects by one cut."""
    sparse = normal(3, 256, 272) * random_mask(4, 256, 272, 0.5)
    stats = InputStats.of(correlated_inputs(5, 600, 272))
    method = Alps(precision=precision)  # type: ignore[arg-type]
    result = method.solve(sparse, method.prepare(stats), restrict_to_nonzeros(base, sparse))
    assert not bool((result.mask & (sparse == 0)).any())
    assert int(result.mask.sum()) == expected_kept(sparse != 0, base)
    if base == Unstructured(0.7):
        small = get_method("magnitude").solve(sparse, None, restrict_to_nonzeros(base, sparse))
        errors = [stats.energy(solution.weight - sparse) for solution in (result, small)]
        assert 0 < errors[0] < 0.8 * errors[1]


@many
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=9))
def test_redistributed_counts_match_a_naive_loop(pairs: list[tuple[int, int]]) -> None:
    counts, room = (list(values) for values in zip(*pairs, strict=True))
    kept = [min(count, most) for count, most in pairs]
    raised = 0
    while sum(kept) < min(sum(counts), sum(room)):
        raised += 1
        for place, most in enumerate(room):
            expected = min(counts[place] + raised, most)
            if kept[place] < expected and sum(kept) < min(sum(counts), sum(room)):
                kept[place] = expected
    assert redistribute(torch.tensor(counts), torch.tensor(room)).tolist() == kept


@many
@given(st.integers(0, 2**16), st.floats(0.0, 0.99), st.floats(0.0, 1.0))
def test_wanda_redistributes_the_counts_of_full_rows(seed: int, sparsity: float, share: float) -> None:
    scores = normal(seed, 6, 20).abs()
    allowed = random_mask(seed + 1, 6, 20, share)
    allowed[seed % 6] = False
    pattern = MaskedPattern(Unstructured(sparsity), allowed)
    mask = keep_largest(scores, pattern, scope="row")
    assert int(mask.sum()) == pattern.kept == expected_kept(allowed, Unstructured(sparsity))
    kept, room = mask.sum(dim=1), allowed.sum(dim=1)
    spare = kept < room
    if bool(spare.any()):
        assert int(kept[spare].max() - kept[spare].min()) <= 2, "rows that have a choice prune alike"
    for row in range(6):
        left = scores[row][mask[row]], scores[row][allowed[row] & ~mask[row]]
        assert not len(left[0]) or not len(left[1]) or float(left[0].min()) >= float(left[1].max())


def test_counts_of_a_masked_pattern() -> None:
    allowed = torch.tensor([[True, True, True, False, False, False, False, True]])
    pattern = MaskedPattern(SemiStructured(2, 4), allowed)
    assert (pattern.kept, pattern.pruned_count(8), pattern.sparsity, str(pattern)) == (3, 5, 0.625, "2:4")
    assert pattern.fits(8) and not pattern.fits(4) and not pattern.is_satisfied
    assert (
        MaskedPattern(Unstructured(0.5), allowed).is_satisfied
        and not MaskedPattern(Unstructured(0.625), allowed).is_satisfied
    )
