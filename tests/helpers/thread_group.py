"""Threads that stand for processes: they sum tensors as the processes of a group do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Process:
    """One of several threads; see `alps.solvers.row_parallel.Rows`."""

    def __init__(self, rank: int, size: int, box: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._box, self._barrier = rank, size, box, barrier

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sums over all threads."""
        self._box[self.rank] = values.clone()
        self._barrier.wait(30)
        found = torch.stack(self._box).sum(dim=0).to(values.dtype)
        self._barrier.wait(30)
        return found


def in_threads(size: int, work: Callable[[Process], Any]) -> list[Any]:
    """What `work` returns in each of so many threads."""
    box, barrier, found = [torch.zeros(())] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(Process(rank, size, box, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
