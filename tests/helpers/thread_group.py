"""Threads in place of processes: groups whose ranks are threads, with the operations of real ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alps.core.distributed import ProcessGroup


class ThreadGroup(ProcessGroup):
    """One of several threads as a rank."""

    def __init__(self, rank: int, size: int, box: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self._box, self._barrier = box, barrier

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all threads, by rank."""
        self._box[self.rank] = value
        self._barrier.wait(30)
        values = list(self._box)
        self._barrier.wait(30)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sums over all threads."""
        return torch.stack(self.all_gather_object(values.clone())).sum(dim=0).to(values.dtype)

    def broadcast_from_main(self, compute: Callable[[], Any]) -> Any:
        """Return what the first thread computes."""
        return self.all_gather_object(compute() if self.is_main else None)[0]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor in all threads by that of one of them."""
        tensor.copy_(self.all_gather_object(tensor.clone())[source])


def run_in_threads(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """Call `work` in as many threads, each with its group, and return the results by rank."""
    box: list[Any] = [None] * size
    barrier, results = threading.Barrier(size), [None] * size

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
