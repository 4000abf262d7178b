"""A matrix solved by rows in several processes: the support, the weights and the samples of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alps.core.distributed import ProcessGroup
from alps.core.statistics import InputStats
from alps.solvers.alps import Alps
from alps.solvers.patterns import SemiStructured, Unstructured
from alps.solvers.row_parallel import RowShard, distributed_topk_mask
from alps.solvers.topk import topk_mask
from helpers.thread_group import run_in_threads


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 4), st.data())
@settings(max_examples=60)
def test_the_largest_of_all_processes_are_those_of_one(values: list[int], size: int, data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32) / 3
    kept = data.draw(st.integers(0, len(values)))
    shards = torch.tensor_split(scores, size)
    masks = run_in_threads(size, lambda group: distributed_topk_mask(shards[group.rank], kept, group))
    assert torch.equal(torch.cat(masks), topk_mask(scores, kept))


@pytest.mark.parametrize("pattern", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("shape", [(96, 32), (512, 256)])
def test_rows_solved_apart_are_those_of_the_whole(
    pattern: Unstructured | SemiStructured, shape: tuple[int, int]
) -> None:
    """To the bit: small layers by the plain steps, large ones by the fused steps, whose selections are not exact."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(shape[1], shape[1], generator=generator)
    inputs = torch.randn(4 * shape[1], shape[1], generator=generator) @ mixing
    weight = torch.randn(shape, generator=generator)
    method, stats = Alps(precision="float32"), InputStats.of(inputs)
    whole = method.solve(weight, method.prepare(stats), pattern)
    bounds = [0, shape[0] // 4, shape[0]]

    def solve(group: ProcessGroup) -> Any:
        shard = weight[bounds[group.rank] : bounds[group.rank + 1]]
        return method.solve_rows(shard, method.prepare(stats), pattern, entries=weight.numel(), group=group)

    solutions = run_in_threads(2, solve)
    mask, answer = (torch.cat([getattr(solution, name) for solution in solutions]) for name in ("mask", "weight"))
    assert int((~mask).sum()) == pattern.pruned_count(weight.numel())
    assert torch.equal(mask, whole.mask) and torch.equal(answer, whole.weight)
    for solution in solutions:
        assert solution.info.iterations == whole.info.iterations
        assert solution.info.refit_steps == whole.info.refit_steps


@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 61), st.data())
@settings(max_examples=60)
def test_a_sample_of_shards_is_that_of_the_whole(entries: int, size: int, stride: int, data: st.DataObject) -> None:
    whole = torch.arange(1.0, entries + 1)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, entries), min_size=size - 1, max_size=size - 1))), entries]

    def sample(group: ProcessGroup) -> Any:
        shard = whole[bounds[group.rank] : bounds[group.rank + 1]]
        scores = RowShard.of(shard[None], 0.5, entries, group).scores(shard)
        return scores.sample(stride), scores.total(len(shard)), scores.entries

    for values, total, counted in run_in_threads(size, sample):
        assert torch.equal(values, whole[::stride]) and total == counted == entries
