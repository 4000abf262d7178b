"""Budgets: exact totals, the optimum against brute force, curves against solves, and what a probe says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alps.models.blocks import find_blocks
from alps.pruning.recipe import ALLOCATIONS
from alps.pruning.sparsity_allocation import allocate_sparsity, minimise_error
from alps.solvers import Alps
from alps.solvers.error_curve import POINTS, ErrorCurve
from alps.solvers.patterns import Pattern, Unstructured
from helpers import runs
from helpers.runs import make_context, make_recipe

_CPU = torch.device("cpu")
_SIXTY = Unstructured(0.6)


def _allocate(model: nn.Module, ids: Tensor, allocation: str) -> dict[str, Pattern]:
    recipe = make_recipe(Alps(), _SIXTY, allocation=allocation)
    return allocate_sparsity(model, find_blocks(model), ids, recipe, make_context())


def _curve(entries: int, power: float, scale: float) -> ErrorCurve:
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    return ErrorCurve(entries, scale * grid**power)


@given(
    sizes=st.lists(st.integers(50, 5000), min_size=1, max_size=6),
    powers=st.lists(st.floats(1.5, 6), min_size=6, max_size=6),
    sparsity=st.floats(0.05, 0.95),
    reach=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
@settings(max_examples=60)
def test_the_total_is_exact_and_the_limits_hold(
    sizes: list[int], powers: list[float], sparsity: float, reach: float
) -> None:
    curves = [_curve(n, power, 1 + i) for i, (n, power) in enumerate(zip(sizes, powers, strict=False))]
    counts = minimise_error(curves, [1.0] * len(curves), sparsity, reach)
    assert sum(counts) == sum(Unstructured(sparsity).pruned_count(n) for n in sizes)
    for n, count in zip(sizes, counts, strict=True):
        slack = len(sizes) + 1
        assert max(sparsity - reach, 0) * n - slack <= count <= min(sparsity + reach, 1) * n + slack


def test_the_allocation_is_the_best_of_all() -> None:
    curves = [_curve(100, 2.0, 1.0), _curve(200, 3.0, 4.0), _curve(100, 2.5, 0.3)]
    weights = [1.0, 0.2, 12.0]
    counts = minimise_error(curves, weights, 0.5, 1.0)

    def loss(zeros: tuple[int, ...] | list[int]) -> float:
        position = [k / c.entries * (POINTS - 1) for k, c in zip(zeros, curves, strict=True)]
        values = [c.errors[int(x)] for x, c in zip(position, curves, strict=True)]
        return float(sum(w * v for w, v in zip(weights, values, strict=True)))

    grid = [(a, b, 200 - a - b) for a, b in itertools.product(range(0, 101, 2), range(0, 201, 2))]
    best = min(loss(zeros) for zeros in grid if 0 <= zeros[2] <= 100)
    assert loss(counts) < best * 1.03
    assert loss([50, 100, 50]) > best * 1.1, "a uniform budget would do as well"


def test_a_heavier_weight_buys_fewer_zeros() -> None:
    curves = [_curve(1000, 3.0, 1.0)] * 2
    even, tilted = minimise_error(curves, [1.0, 1.0], 0.6, 0.5), minimise_error(curves, [4.0, 1.0], 0.6, 0.5)
    assert even[0] == pytest.approx(600, abs=6) and tilted[0] < 500 and sum(tilted) == 1200


@pytest.mark.parametrize("name", ALLOCATIONS[1:])
def test_a_plan_covers_every_site_once_and_keeps_the_total(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, name: str
) -> None:
    model, untouched = tiny_model(kind), tiny_model(kind)
    blocks = find_blocks(model)
    patterns = _allocate(model, ids, name)
    sizes = {site.name: site.read().numel() for block in blocks for site in block.sites}
    assert patterns.keys() == sizes.keys()
    zeros = sum(patterns[key].pruned_count(size) for key, size in sizes.items())
    assert zeros == sum(Unstructured(0.6).pruned_count(n) for n in sizes.values())
    assert len({str(pattern) for pattern in patterns.values()}) > 1
    for key, parameter in untouched.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), "a plan must leave the model as it was"


def test_the_walk_prunes_by_the_plan(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    patterns = _allocate(model, ids, "sensitivity")
    results = runs.prune(model, ids, Alps(), _SIXTY, allocation="sensitivity")
    for layer in results.layers:
        assert layer.zeros == patterns[layer.name].pruned_count(layer.entries)
    total = sum(_SIXTY.pruned_count(layer.entries) for layer in results.layers)
    assert sum(layer.zeros for layer in results.layers) == total
    sparsities = [layer.sparsity for layer in results.layers]
    assert max(sparsities) - min(sparsities) > 0.05
    assert results.seconds["allocation"] > 0


class _Told:
    """Progress by job: title, announced steps, reported steps."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, int, int]] = []
        self.open: list[str] = []

    def start(self, title: str, total: int) -> None:
        assert not self.open, "a job began within another"
        self.open.append(title)
        self.jobs.append((title, total, 0))

    def step(self, detail: str) -> None:
        title, total, steps = self.jobs[-1]
        self.jobs[-1] = title, total, steps + 1

    def finish(self) -> None:
        self.open.pop()


@pytest.mark.parametrize(("name", "steps"), [("owl", 3), ("error", 3), ("sensitivity", 6)])
def test_planning_is_a_job_of_its_own_for_the_watcher(
    tiny_model: Callable[..., Any], ids: Tensor, name: str, steps: int
) -> None:
    model, told = tiny_model("llama"), _Told()
    runs.prune(model, ids, Alps(), _SIXTY, allocation=name, progress=told)
    assert told.jobs == [(f"allocation {name}", steps, steps), ("alps 60%", 21, 21)]
    assert not told.open


def test_a_site_without_influence_pays_only_where_the_loss_is_asked(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    # Relative errors do not see the scale of a site, the model's answers do.
    muted = next(site for site in blocks[1].sites if site.kind == "down_proj")
    muted.write(muted.read() * 1e-3)
    by_loss, by_error = (_allocate(model, ids, name)[muted.name] for name in ("sensitivity", "error"))
    size = muted.read().numel()
    assert by_loss.pruned_count(size) == pytest.approx(0.75 * size, abs=size * 0.01)
    assert by_error.pruned_count(size) < 0.72 * size


def test_owl_gives_blocks_with_outliers_fewer_zeros(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for site in find_blocks(model)[1].sites:
            site.read()[:, 0] *= 40
    patterns = _allocate(model, ids, "owl")
    of_block = [patterns[block.sites[0].name].pruned_count(10**6) / 10**6 for block in find_blocks(model)]
    assert of_block[1] == min(of_block) and max(of_block) - min(of_block) == pytest.approx(0.16, abs=2e-3)
