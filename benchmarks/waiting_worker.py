"""Solve a random layer again and again with the waiting threads of an `alps` command, for waiting_policy.py.

    python benchmarks/waiting_worker.py SIZE COUNT

Each line of stdin starts COUNT solves of a layer of SIZE x SIZE; the answer on stdout is their seconds.
"""

from __future__ import annotations

import os
import sys
import time

from alps.core.cpu_load import is_busy
from alps.core.openmp import openmp_settings


def main(size: int, count: int) -> None:
    """Choose the settings as a command does, and then import torch."""
    os.environ.update(openmp_settings(os.environ, is_busy))

    import torch

    from alps.core.statistics import InputSums, Needs
    from alps.solvers.alps import Alps
    from alps.solvers.patterns import Unstructured

    torch.manual_seed(0)
    sums = InputSums.zeros(size, Needs.GRAM)
    sums.update(torch.randn(4, 512, size) @ torch.randn(size, size) / size**0.5)
    stats, weight, method = sums.into_stats(), torch.randn(size, size), Alps()
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(count):
            method.solve(weight, method.prepare(stats), Unstructured(0.7))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
