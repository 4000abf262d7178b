"""Zeros that are there stay: what must hold for every method under `MaskedPattern`, and the counts it promises."""

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
from helpers.problems import PROBLEMS, correlated_inputs, hessian64, normal, objective64, random_mask
from solvers.test_every_method import ALL, PATTERNS, bits, method_of, problem_of

many = settings(max_examples=150)


def solve(name: str, weight: Tensor, inputs: Tensor, pattern: Pattern) -> Solution:
    method, stats = method_of(name), InputStats.of(inputs)
    return method.solve(weight, method.prepare(stats), pattern)


def some(seed: int, weight: Tensor, share: float) -> Tensor:
    """A seeded mask of the weight's shape."""
    return random_mask(seed, weight.shape[0], weight.shape[1], share)


def expected_kept(allowed: Tensor, pattern: Unstructured | SemiStructured) -> int:
    """Counted one by one."""
    if isinstance(pattern, Unstructured):
        return min(allowed.numel() - round(pattern.sparsity * allowed.numel()), int(allowed.sum()))
    groups = [group for row in allowed.tolist() for group in zip(*[iter(row)] * pattern.group, strict=True)]
    return sum(min(sum(group), pattern.keep) for group in groups)


@pytest.mark.parametrize("aims_elsewhere", [False, True], ids=["zeros in the aim", "none in the aim"])
@pytest.mark.parametrize("share", [0.75, 0.4, 0.02])
@pytest.mark.parametrize("name", ALL)
def test_no_zero_comes_back_and_counts_are_exact(name: str, share: float, aims_elsewhere: bool) -> None:
    """With a dense target what is to be reproduced is not zero where the weight is."""
    for problem in ("gaussian", "correlated", "dead_inputs", "rounded_weight", "equal_weights", "few_tokens"):
        weight, inputs = problem_of(problem)
        allowed = some(len(problem), weight, share)
        aim = weight if aims_elsewhere else weight * allowed
        for base in PATTERNS:
            pattern = restrict_to_nonzeros(base.base, weight * allowed)
            assert isinstance(pattern, MaskedPattern) and torch.equal(pattern.allowed, allowed)
            found = solve(name, aim, inputs, pattern)
            assert not bool((found.mask & ~allowed).any()), (problem, str(base))
            assert not bool(bits(found.weight)[~found.mask].any())
            assert int(found.mask.sum()) == expected_kept(allowed, base.base) == pattern.kept
            if isinstance(base, SemiStructured):
                groups = [mask.reshape(-1, base.group).sum(dim=1) for mask in (found.mask, allowed)]
                assert torch.equal(groups[0], groups[1].clamp_max(base.keep))
            assert pattern.is_satisfied == torch.equal(found.mask, allowed)
            assert bool(torch.isfinite(found.weight).all())


@pytest.mark.parametrize("name", ALL)
def test_where_everything_is_allowed_the_answer_is_the_same_to_the_bit(name: str) -> None:
    for problem in PROBLEMS:
        weight, inputs = problem_of(problem)
        for base in PATTERNS:
            if not base.fits(weight.shape[1]):
                continue
            wrapped = MaskedPattern(base.base, torch.ones_like(weight, dtype=torch.bool))
            plain, found = solve(name, weight, inputs, base), solve(name, weight, inputs, wrapped)
            if problem == "zero_weight" and wrapped.kept < weight.numel():
                assert not bool(found.weight.any())
            assert torch.equal(bits(plain.weight), bits(found.weight)) and torch.equal(plain.mask, found.mask)
    dense = problem_of("gaussian").weight
    assert restrict_to_nonzeros(Unstructured(0.5), dense) == Unstructured(0.5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", [Unstructured(0.5), Unstructured(0.0), SemiStructured(2, 4)], ids=str)
def test_a_weight_with_zeros_enough_keeps_its_bits(name: str, base: Unstructured | SemiStructured) -> None:
    weight, inputs = problem_of("correlated")
    sparse = weight * keep_largest(weight.abs(), base if base.sparsity else Unstructured(0.3))
    for aim in (sparse, sparse * some(1, weight, 0.8)):
        found = solve(name, aim, inputs, restrict_to_nonzeros(base, aim))
        assert found.info.status is Status.UNCHANGED
        assert torch.equal(found.weight, aim) and torch.equal(found.mask, aim != 0)


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "wanda+refit"])
@pytest.mark.parametrize("base", [Unstructured(0.7), SemiStructured(1, 4)], ids=str)
def test_what_is_chosen_is_better_than_what_is_smallest(name: str, base: Unstructured | SemiStructured) -> None:
    weight, inputs = problem_of("correlated")
    sparse = weight * some(7, weight, 0.6)
    hessian, _ = hessian64(inputs)
    pattern = restrict_to_nonzeros(base, sparse)
    by_size = solve("magnitude", sparse, inputs, pattern).weight
    errors = [objective64(one, sparse, hessian).sum() for one in (solve(name, sparse, inputs, pattern).weight, by_size)]
    assert 0 < float(errors[0]) < 0.8 * float(errors[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", [Unstructured(0.7), Unstructured(0.45), SemiStructured(2, 4)], ids=str)
def test_large_sites_keep_their_zeros(base: Unstructured | SemiStructured, precision: str) -> None:
    """From 2^16 weights on the splitting projects by one cut."""
    sparse = normal(3, 256, 272) * random_mask(4, 256, 272, 0.5)
    stats = InputStats.of(correlated_inputs(5, 600, 272))
    method = Alps(precision=precision)  # type: ignore[arg-type]
    found = method.solve(sparse, method.prepare(stats), restrict_to_nonzeros(base, sparse))
    assert not bool((found.mask & (sparse == 0)).any())
    assert int(found.mask.sum()) == expected_kept(sparse != 0, base)
    if base == Unstructured(0.7):
        small = get_method("magnitude").solve(sparse, None, restrict_to_nonzeros(base, sparse))
        errors = [stats.energy(one.weight - sparse) for one in (found, small)]
        assert 0 < errors[0] < 0.8 * errors[1]


@many
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=9))
def test_capped_counts_are_filled_one_by_one(pairs: list[tuple[int, int]]) -> None:
    counts, room = (list(values) for values in zip(*pairs, strict=True))
    kept = [min(count, most) for count, most in pairs]
    raised = 0
    while sum(kept) < min(sum(counts), sum(room)):
        raised += 1
        for place, most in enumerate(room):
            wanted = min(counts[place] + raised, most)
            if kept[place] < wanted and sum(kept) < min(sum(counts), sum(room)):
                kept[place] = wanted
    assert redistribute(torch.tensor(counts), torch.tensor(room)).tolist() == kept


@many
@given(st.integers(0, 2**16), st.floats(0.0, 0.99), st.floats(0.0, 1.0))
def test_wanda_shares_what_rows_cannot_take(seed: int, sparsity: float, share: float) -> None:
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


def test_a_pattern_within_a_matrix_tells_its_counts() -> None:
    allowed = torch.tensor([[True, True, True, False, False, False, False, True]])
    pattern = MaskedPattern(SemiStructured(2, 4), allowed)
    assert (pattern.kept, pattern.pruned_count(8), pattern.sparsity, str(pattern)) == (3, 5, 0.625, "2:4")
    assert pattern.fits(8) and not pattern.fits(4) and not pattern.is_satisfied
    assert (
        MaskedPattern(Unstructured(0.5), allowed).is_satisfied
        and not MaskedPattern(Unstructured(0.625), allowed).is_satisfied
    )
