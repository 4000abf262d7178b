"""Threads in place of processes: groups whose ranks are threads, with the all-reduce of real ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alps.core.distributed import ProcessGroup


class ThreadGroup(ProcessGroup):
    """One of several threads as a rank."""

    def __init__(self, rank: int, size: int, box: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self._box, self._barrier = box, barrier

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sums over all threads."""
        self._box[self.rank] = values.clone()
        self._barrier.wait(30)
        total = torch.stack(self._box).sum(dim=0).to(values.dtype)
        self._barrier.wait(30)
        return total


def run_in_threads(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """Call `work` in as many threads, each with its group, and return the results by rank."""
    box, barrier, results = [torch.zeros(())] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, size, box, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
