"""One table: what must hold for every method, on every problem, under every pattern."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from alps.core.errors import ConfigError, SolveFailed
from alps.core.statistics import InputStats, InputSums, Needs
from alps.solvers import METHODS, Method, get_method
from alps.solvers.base import Solution, Status
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.problems import PROBLEMS, Problem, correlated_inputs, hessian64, normal, objective64

ALL = [name + suffix for name in METHODS for suffix in ("", "+refit")]
PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.999),
    SemiStructured(2, 4),
    SemiStructured(1, 4),
    SemiStructured(4, 8),
    SemiStructured(3, 5),
]
every_method = pytest.mark.parametrize("name", ALL)
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


@cache
def problem_of(name: str) -> Problem:
    return PROBLEMS[name]()


def method_of(name: str) -> Method:
    base, _, extra = name.partition("+")
    return get_method(base, refit=extra == "refit")


def solve(name: str, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solution:
    method = method_of(name)
    return method.solve(weight, method.prepare(stats), pattern)


def select_within_budget(problem: str) -> list[Pattern]:
    return [pattern for pattern in PATTERNS if pattern.fits(problem_of(problem).weight.shape[1])]


def output_distance(first: Tensor, second: Tensor, inputs: Tensor) -> float:
    """||first - second|| / ||first|| in the norm of the damped Hessian, in which a refit converges."""
    hessian, _ = hessian64(inputs)
    size = objective64(first, torch.zeros_like(first), hessian).sum()
    return float((objective64(first, second, hessian).sum() / size.clamp_min(1e-30)).sqrt())


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def test_the_table_is_complete() -> None:
    assert [get_method(name).name for name in METHODS] == list(METHODS)
    assert [method_of(name).name for name in ALL] == ALL
    assert len(select_within_budget("gaussian")) == len(PATTERNS) and len(select_within_budget("one_input")) == 3


@every_method
def test_a_traced_method_answers_the_same_and_notes_errors_where_it_iterates(name: str) -> None:
    weight, inputs = problem_of("correlated")
    stats, method = InputStats.of(inputs), method_of(name).traced()
    plain = solve(name, weight, stats, Unstructured(0.7))
    traced = method.solve(weight, method.prepare(stats), Unstructured(0.7))
    assert method.name == name and torch.equal(bits(traced.weight), bits(plain.weight))
    assert all(point.error is None for point in plain.info.trace)
    assert all(point.error is not None for point in traced.info.trace)
    assert bool(traced.info.trace) == name.startswith("alps")


@every_problem
@every_method
def test_what_comes_back_is_pruned_exactly(name: str, problem: str) -> None:
    weight, inputs = problem_of(problem)
    stats = InputStats.of(inputs)
    before = weight.clone()
    for pattern in select_within_budget(problem):
        solution = solve(name, weight, stats, pattern)
        mask, found = solution.mask, solution.weight
        assert mask.shape == found.shape == weight.shape
        assert mask.dtype == torch.bool and found.dtype == torch.float32
        if isinstance(pattern, SemiStructured):
            assert bool((mask.reshape(-1, pattern.group).sum(dim=1) == pattern.keep).all())
        else:
            assert int((~mask).sum()) == round(pattern.sparsity * weight.numel())
        assert not bool(bits(found)[~mask].any()), "pruned weights are +0.0, bit for bit"
        assert bool(torch.isfinite(found).all())
        assert torch.equal(bits(weight), bits(before)), "the caller's weight is not touched"
        again = solve(name, weight, InputStats.of(inputs), pattern)
        assert torch.equal(bits(found), bits(again.weight)) and torch.equal(mask, again.mask)


@every_problem
@every_method
def test_the_scale_of_the_sums_does_not_matter(name: str, problem: str) -> None:
    """Four times the same tokens, equal to the bit: neither 4 nor its square root changes any rounding."""
    weight, inputs = problem_of(problem)
    once = InputSums.of(inputs)
    twice = once + once
    four_times = (twice + twice).to_stats()
    for pattern in select_within_budget(problem):
        one, four = solve(name, weight, once.to_stats(), pattern), solve(name, weight, four_times, pattern)
        assert torch.equal(one.mask, four.mask)
        assert torch.equal(bits(one.weight), bits(four.weight))


# Twice is not a square: the scale to unit diagonal rounds anew. Only problems without a near tie on ALPS's way
# can ask for the very same support.
@pytest.mark.parametrize("problem", ["gaussian", "correlated"])
@every_method
def test_twice_the_tokens_change_nothing(name: str, problem: str) -> None:
    weight, inputs = problem_of(problem)
    once = InputSums.of(inputs)
    for pattern in select_within_budget(problem):
        one, two = (solve(name, weight, sums.to_stats(), pattern) for sums in (once, once + once))
        assert torch.equal(one.mask, two.mask)
        assert output_distance(one.weight, two.weight, inputs) < 1e-3


@every_problem
@every_method
def test_sparsity_zero_returns_the_weight(name: str, problem: str) -> None:
    weight, inputs = problem_of(problem)
    solution = solve(name, weight, InputStats.of(inputs), Unstructured(0.0))
    assert torch.equal(bits(solution.weight), bits(weight))
    assert bool(solution.mask.all()) and solution.info.status is Status.UNCHANGED
    assert solution.weight.data_ptr() != weight.data_ptr()


@every_method
def test_rows_may_come_in_any_order(name: str) -> None:
    """Without ties, and with a count that every row can share evenly: then no position decides anything."""
    weight, inputs = problem_of("correlated")
    stats = InputStats.of(inputs)
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(1))
    for pattern in (Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4), SemiStructured(3, 5)):
        straight, shuffled = solve(name, weight, stats, pattern), solve(name, weight[order], stats, pattern)
        assert torch.equal(straight.mask[order], shuffled.mask)
        assert output_distance(straight.weight[order], shuffled.weight, inputs) < 1e-3


# SparseGPT sweeps from left to right and only corrects what lies to the right: the order of the inputs is
# part of its answer, and so of the mask that DSnoT takes from it.
@pytest.mark.parametrize("name", [name for name in ALL if "sparsegpt" not in name])
def test_inputs_may_come_in_any_order(name: str) -> None:
    weight, inputs = problem_of("correlated")
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2))
    for sparsity in (0.5, 0.7):
        straight = solve(name, weight, InputStats.of(inputs), Unstructured(sparsity))
        shuffled = solve(name, weight[:, order], InputStats.of(inputs[:, order]), Unstructured(sparsity))
        assert torch.equal(straight.mask[:, order], shuffled.mask)
        assert output_distance(straight.weight[:, order], shuffled.weight, inputs[:, order]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_half_precision_weights_are_solved_in_float32(name: str, dtype: torch.dtype) -> None:
    inputs = correlated_inputs(70, 60, 16)
    weight = normal(71, 6, 16).to(dtype)
    stats = InputStats.of(inputs)
    half = solve(name, weight, stats, SemiStructured(2, 4))
    full = solve(name, weight.float(), stats, SemiStructured(2, 4))
    assert half.weight.dtype == torch.float32
    assert torch.equal(bits(half.weight), bits(full.weight)) and torch.equal(half.mask, full.mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_method
def test_broken_weights_are_refused(name: str, bad: float) -> None:
    weight, inputs = problem_of("gaussian")
    broken = weight.clone()
    broken[3, 7] = bad
    for pattern in (Unstructured(0.0), Unstructured(0.5), SemiStructured(2, 4)):
        with pytest.raises(SolveFailed, match="dense weights hold NaN or infinite"):
            solve(name, broken, InputStats.of(inputs), pattern)


@every_method
def test_the_state_serves_several_sites(name: str) -> None:
    """q, k and v share one prepared state: solving one must leave nothing behind for the next."""
    weight, inputs = problem_of("correlated")
    method = method_of(name)
    stats = InputStats.of(inputs)
    state = method.prepare(stats)
    method.solve(normal(80, 8, 40), state, Unstructured(0.7))
    shared = method.solve(weight, state, Unstructured(0.5))
    alone = method.solve(weight, method.prepare(stats), Unstructured(0.5))
    assert torch.equal(bits(shared.weight), bits(alone.weight))


@every_method
def test_no_more_is_read_than_was_asked_for(name: str) -> None:
    """A method that says it needs moments must do without the Gram."""
    weight, inputs = problem_of("correlated")
    method = method_of(name)
    lean = InputStats.of(inputs, method.needs)
    found = method.solve(weight, method.prepare(lean), Unstructured(0.5))
    assert torch.equal(found.mask, solve(name, weight, InputStats.of(inputs), Unstructured(0.5)).mask)
    assert (method.needs == Needs.GRAM) == (name not in ("magnitude", "wanda", "dsnot"))


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wanda'"):
        get_method("wnada")
