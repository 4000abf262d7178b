"""The group of processes: shares of rows and batches, sums that an owner keeps, and a group of one."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.core.statistics import InputSums
from helpers import group_threads
from helpers.cli_process import run_group
from helpers.thread_group import run_in_threads


def test_ranks_that_do_not_own_statistics_release_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reduce", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda tensor, dst=None: tensor.mul_(2))
    for rank, owner, held in [(0, 0, True), (1, 0, False), (0, None, True), (1, None, True)]:
        sums = InputSums.of(torch.ones(3, 2))
        ProcessGroup(rank, 2).reduce_statistics(sums, owner)
        assert (sums.panels is not None) == held and sums.tokens == 6
        assert not held or sums.to_stats().gram().tolist() == [[6, 6], [6, 6]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_batches_are_the_same_rows_in_any_number_of_processes(count: int, batch: int, size: int) -> None:
    rows = torch.arange(max(count, size))
    sizes = [ProcessGroup(rank, size).shard_batch_sizes(len(rows), batch) for rank in range(size)]
    batches = torch.split(rows, max(batch, size))
    for i, expected in enumerate(batches):
        values = []
        for rank, counts in enumerate(sizes):
            shard = ProcessGroup(rank, size).shard(rows)
            values += shard[sum(counts[:i]) : sum(counts[: i + 1])].tolist()
        assert sorted(values) == expected.tolist()
    for counts in sizes:
        assert len(counts) in (len(batches), len(batches) - 1) and min(counts) > 0


def test_one_process_is_a_group_without_messages() -> None:
    group, sums = ProcessGroup(), InputSums.of(torch.ones(3, 2))
    values = torch.arange(4)
    group.reduce_statistics(sums, 0)
    group.barrier()
    assert sums.tokens == 3 and group.broadcast_from_main(lambda: 5) == 5 and group.all_gather_object(1) == [1]
    assert torch.equal(group.shard(values), values) and group.all_reduce_sum(values) is values
    with pytest.raises(ConfigError, match="4 windows cannot be split over 5 processes"):
        ProcessGroup(1, 5).shard(values)


def test_a_generator_runs_on_the_main_rank_alone_and_all_ranks_meet_at_its_steps() -> None:
    started: list[int] = []

    def work(group: ProcessGroup) -> tuple[int, int]:
        steps: list[int] = []

        def generate() -> Generator[None, None, int]:
            started.append(group.rank)
            for _ in range(3):
                yield
            return 7

        return group.run_on_main(generate, lambda: steps.append(1)), len(steps)

    assert run_in_threads(2, work) == [(7, 3)] * 2 and started == [0]
    assert work(ProcessGroup()) == (7, 3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_outlives_the_group() -> None:
    ended = run_group(2, work=group_threads.main)
    assert [(process.returncode, process.stdout) for process in ended] == [(0, "[]\n")] * 2, ended
