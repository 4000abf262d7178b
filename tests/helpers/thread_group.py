"""Threads that act as the ranks of a process group and sum tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ThreadRank:
    """One of several threads, with the interface of `alps.solvers.row_parallel.Rows`."""

    def __init__(self, rank: int, size: int, box: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._box, self._barrier = rank, size, box, barrier

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sums over all threads."""
        self._box[self.rank] = values.clone()
        self._barrier.wait(30)
        total = torch.stack(self._box).sum(dim=0).to(values.dtype)
        self._barrier.wait(30)
        return total


def run_in_threads(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """Run `work` in `size` threads, and return its results by rank."""
    box, barrier, results = [torch.zeros(())] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, size, box, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
