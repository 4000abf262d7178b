"""The sites of a block among several processes: who solves what, and how all come to hold the answers.

legend  n  inputs of a site                                  scalar
        m  its outputs                                       scalar
        R  iterations of a solve                             scalar
        K  inverses of n x n that they take                  scalar
A solve takes about K n^3 + 2 R m n^2 operations, and the sites of one input share the first term. Whole inputs go to
the process with the least to do (`assign`); one that would keep a process busy while others wait is split by rows: that
shares out the second term alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alps.calibration.moe_statistics import LayerInput
from alps.core.distributed import ProcessGroup
from alps.models.blocks import Block
from alps.pruning.layer_solver import LayerSolver
from alps.reporting.run_report import LayerRecord
from alps.solvers.alps import Alps
from alps.solvers.base import Method

# K and R of ALPS as most solves of SmolLM2-135M take them (docs/scaling.md); other methods: one factor, one sweep.
_INVERSES, _ITERATIONS = 16.0, 40.0
# An input is split where that takes at least this share off the busiest process.
_WORTH = 0.1
# Fewer rows a process are not worth a message at every check.
_ROWS = 16


@dataclass(frozen=True)
class SolveCost:
    """What it takes to solve all sites of one input, in operations.

    Attributes:
        fixed: for the inverses, in every process that solves a part of it.
        rows: shared out among them.
        divisible: whether it can be split.
    """

    fixed: float
    rows: float
    divisible: bool

    @property
    def cost(self) -> float:
        """What it takes in one process."""
        return self.fixed + self.rows


def solve_cost(method: Method, shapes: Sequence[tuple[int, int]], size: int, divisible: bool = True) -> SolveCost:
    """The job of some sites (out, in) of one input, for `size` processes."""
    inputs = shapes[0][1]
    outputs = sum(rows for rows, _ in shapes)
    inverses, iterations = (_INVERSES, _ITERATIONS) if isinstance(method, Alps) else (1.0, 1.0)
    enough = min(rows for rows, _ in shapes) >= _ROWS * size
    whole = not (isinstance(method, Alps) and divisible and enough)
    return SolveCost(inverses * inputs**3, 2 * iterations * outputs * inputs**2, not whole)


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Who does what: every job to the process with the least to do so far, longest jobs first.

    Graham's rule (SIAM J. Appl. Math. 17, 1969): at most 4/3 of the best possible time of the busiest one.
    """
    owners, loads = [0] * len(costs), [0.0] * size
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        owners[job], loads[owner] = owner, loads[owner] + costs[job]
    return owners


def shared_out(jobs: Sequence[SolveCost], size: int) -> list[int | None]:
    """Who solves each input: a process, or None for all of them, each some rows."""
    owners: list[int | None] = list(assign([job.cost for job in jobs], size))
    while True:
        loads = loads_of(jobs, owners, size)
        busiest = loads.index(max(loads))
        mine = [i for i, owner in enumerate(owners) if owner == busiest and jobs[i].divisible]
        if not mine:
            return owners
        longest = max(mine, key=lambda i: jobs[i].cost)
        whole = [i for i, owner in enumerate(owners) if owner is not None and i != longest]
        tried: list[int | None] = [None] * len(jobs)
        for i, owner in zip(whole, assign([jobs[i].cost for i in whole], size), strict=True):
            tried[i] = owner
        if max(loads_of(jobs, tried, size)) > (1 - _WORTH) * max(loads):
            return owners
        owners = tried


def loads_of(jobs: Sequence[SolveCost], owners: Sequence[int | None], size: int) -> list[float]:
    """Operations of every process."""
    every = sum(job.fixed + job.rows / size for job, owner in zip(jobs, owners, strict=True) if owner is None)
    loads = [every] * size
    for job, owner in zip(jobs, owners, strict=True):
        if owner is not None:
            loads[owner] += job.cost
    return loads


def solve_sites(solver: LayerSolver, group: ProcessGroup, block: Block, shared: Sequence[LayerInput]) -> None:
    """Prune the sites of some inputs; afterwards every process has all their weights and records.

    Args:
        shared: the same inputs in the same order in every process, each with the sums of its own windows.

    Raises:
        SolveFailed: when inputs or answers are not finite; names the sites.
        RankLost: when another process failed.
    """
    jobs = [
        solve_cost(solver.method, [site.shape for site in one.sites], group.size, _divisible(solver, one))
        for one in shared
    ]
    owners = shared_out(jobs, group.size) if group.size > 1 else [0] * len(shared)
    with solver.phases.measure("communication"):
        for one, owner in zip(shared, owners, strict=True):
            group.current_stage = f"block {block.index}, inputs of {one.name}"
            group.reduce_statistics(one.sums, owner)
    begun = len(solver.records)
    for one, owner in sorted(zip(shared, owners, strict=True), key=lambda pair: pair[1] is not None):
        if owner is None or owner == group.rank:
            group.current_stage = f"block {block.index}, {one.name}"
            solver.shared_input(block, one, group if owner is None else None)
    if group.size > 1:
        with solver.phases.measure("communication"):
            group.current_stage = f"block {block.index}, the answers"
            for one, owner in zip(shared, owners, strict=True):
                if owner is not None:
                    _spread(one, group, owner)
            _collect(solver, group, shared, begun)


def _divisible(solver: LayerSolver, shared: LayerInput) -> bool:
    patterns = [solver.patterns.get(site.name, solver.pattern) for site in shared.sites]
    return not solver.respect_zeros and not any(pattern.keeps_all for pattern in patterns)


def _spread(shared: LayerInput, group: ProcessGroup, owner: int) -> None:
    """Every process gets the weights that one of them has solved, as they are stored."""
    flat = torch.cat([site.read().reshape(-1) for site in shared.sites])
    group.broadcast(flat, owner)
    if group.rank != owner:
        for site, part in zip(shared.sites, torch.split(flat, [site.entries for site in shared.sites]), strict=True):
            site.read().copy_(part.view(site.shape))


def _collect(solver: LayerSolver, group: ProcessGroup, shared: Sequence[LayerInput], begun: int) -> None:
    """Every process gets the records of all, in the order of the sites."""
    mine = solver.records[begun:]
    found: dict[str, LayerRecord] = {record.name: record for one in group.all_gather_object(mine) for record in one}
    known = {record.name for record in mine}
    del solver.records[begun:]
    for site in (site for one in shared for site in one.sites):
        solver.records.append(found[site.name])
        if site.name not in known:
            solver.told(found[site.name])
