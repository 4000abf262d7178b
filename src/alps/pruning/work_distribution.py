"""Share the layers of a block among ranks: who solves which input, and how all ranks get the weights.

legend  n  inputs of a layer                                 scalar
        m  its outputs                                       scalar
        R  iterations of a solve                             scalar
        K  inverses of n x n that they take                  scalar
A solve takes about K n^3 + 2 R m n^2 operations, and the layers of one input share the first term. Whole inputs go to
the rank with the least load (`assign`). An input that would keep one rank busy while others idle is split by rows,
which shares the second term alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.moe_statistics import LayerInput
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.models.blocks import Block
from alps.pruning.layer_solver import LayerSolver
from alps.reporting.run_report import LayerRecord
from alps.solvers.alps import Alps
from alps.solvers.base import Method

# K and R of ALPS in most solves of SmolLM2-135M, docs/explanation/several-processes.md; others: one factor, one sweep.
_INVERSES, _ITERATIONS = 16.0, 40.0
# An input is split where that takes at least this share off the busiest rank.
_MIN_SPLIT_GAIN = 0.1
# Fewer rows per rank are not worth a message at every check.
_MIN_ROWS = 16


@dataclass(frozen=True)
class SolveCost:
    """Operations that the layers of one input take.

    Attributes:
        fixed: for the inverses, on every rank that solves a part of the input.
        rows: shared among those ranks.
        divisible: True if the input can be split by rows.
    """

    fixed: float
    rows: float
    divisible: bool

    @property
    def total(self) -> float:
        """Operations on a single rank."""
        return self.fixed + self.rows


def solve_cost(method: Method, shapes: Sequence[tuple[int, int]], size: int, divisible: bool = True) -> SolveCost:
    """Estimate the cost of the layers of one input.

    Args:
        method: that solves them.
        shapes: (out, in) of the layers.
        size: number of ranks.
        divisible: False if the patterns forbid a split.
    """
    inputs = shapes[0][1]
    outputs = sum(rows for rows, _ in shapes)
    inverses, iterations = (_INVERSES, _ITERATIONS) if isinstance(method, Alps) else (1.0, 1.0)
    has_rows = min(rows for rows, _ in shapes) >= _MIN_ROWS * size
    splits = isinstance(method, Alps) and divisible and has_rows
    return SolveCost(inverses * inputs**3, 2 * iterations * outputs * inputs**2, splits)


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Assign every job to the rank with the least load so far, longest jobs first.

    Graham's rule (SIAM J. Appl. Math. 17, 1969): the busiest rank takes at most 4/3 of the best possible time.
    """
    owners, loads = [0] * len(costs), [0.0] * size
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        owners[job], loads[owner] = owner, loads[owner] + costs[job]
    return owners


def assign_inputs(costs: Sequence[SolveCost], size: int) -> list[int | None]:
    """Return the rank that solves each input, None for all ranks, each some rows."""
    owners: list[int | None] = list(assign([cost.total for cost in costs], size))
    while True:
        loads = rank_loads(costs, owners, size)
        busiest = loads.index(max(loads))
        candidates = [i for i, owner in enumerate(owners) if owner == busiest and costs[i].divisible]
        if not candidates:
            return owners
        longest = max(candidates, key=lambda i: costs[i].total)
        whole = [i for i, owner in enumerate(owners) if owner is not None and i != longest]
        trial: list[int | None] = [None] * len(costs)
        for i, owner in zip(whole, assign([costs[i].total for i in whole], size), strict=True):
            trial[i] = owner
        if max(rank_loads(costs, trial, size)) > (1 - _MIN_SPLIT_GAIN) * max(loads):
            return owners
        owners = trial


def rank_loads(costs: Sequence[SolveCost], owners: Sequence[int | None], size: int) -> list[float]:
    """Return the operations of every rank."""
    split = sum(cost.fixed + cost.rows / size for cost, owner in zip(costs, owners, strict=True) if owner is None)
    loads = [split] * size
    for cost, owner in zip(costs, owners, strict=True):
        if owner is not None:
            loads[owner] += cost.total
    return loads


def solve_layers(
    solver: LayerSolver, block: Block, inputs: Sequence[LayerInput], row_weights: Mapping[str, Tensor]
) -> list[LayerRecord]:
    """Prune the layers of some inputs of a block. Afterwards every rank has all weights and all records.

    Args:
        solver: of the block.
        block: that holds the layers.
        inputs: in the same order on all ranks, each with the sums over the windows of its rank.
        row_weights: of single layers by name, shape (out,).

    Returns:
        The records in the order of `inputs` and their layers.

    Raises:
        SolveFailed: when inputs or solutions are not finite; names the layers.
        RankLost: when another rank failed.
    """
    group = solver.context.group
    costs = [
        solve_cost(
            solver.recipe.method, [site.shape for site in source.sites], group.size, _is_divisible(solver, source)
        )
        for source in inputs
    ]
    owned = list(zip(inputs, assign_inputs(costs, group.size), strict=True))
    with solver.timer.measure("communication"):
        for source, owner in owned:
            group.current_stage = f"block {block.index}, inputs of {source.name}"
            group.reduce_statistics(source.sums, owner)
    records = []
    # Inputs of all ranks come first: a rank that began with its own would keep the others waiting.
    for source, owner in sorted(owned, key=lambda pair: pair[1] is not None):
        if owner is None or owner == group.rank:
            group.current_stage = f"block {block.index}, {source.name}"
            records += solver.solve_input(block, source, row_weights, group if owner is None else SINGLE_PROCESS)
    if group.size == 1:
        return records
    with solver.timer.measure("communication"):
        group.current_stage = f"block {block.index}, the solutions"
        for source, owner in owned:
            if owner is not None:
                _broadcast_weights(source, group, owner)
        return _gather_records(solver, group, inputs, records)


def _is_divisible(solver: LayerSolver, source: LayerInput) -> bool:
    keeps_all = any(solver.pattern_of(site).keeps_all for site in source.sites)
    return not solver.recipe.keep_zeros and not keeps_all


def _broadcast_weights(source: LayerInput, group: ProcessGroup, owner: int) -> None:
    """Give every rank the stored weights that one of them has solved."""
    flat = torch.cat([site.read().reshape(-1) for site in source.sites])
    group.broadcast(flat, owner)
    if group.rank != owner:
        for site, part in zip(source.sites, torch.split(flat, [site.entries for site in source.sites]), strict=True):
            site.read().copy_(part.view(site.shape))


def _gather_records(
    solver: LayerSolver, group: ProcessGroup, inputs: Sequence[LayerInput], records: Sequence[LayerRecord]
) -> list[LayerRecord]:
    """Return the records of all ranks in the order of the layers, and report those of other ranks as done."""
    gathered: Mapping[str, LayerRecord] = {
        record.name: record for part in group.all_gather_object(list(records)) for record in part
    }
    local = {record.name for record in records}
    ordered = [gathered[site.name] for source in inputs for site in source.sites]
    for record in ordered:
        if record.name not in local:
            solver.report_progress(record)
    return ordered
