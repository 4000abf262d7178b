"""The sites of a block, one after the other: what they are to reproduce, the solver, the write, the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alps.calibration.moe_statistics import LayerInput
from alps.core.errors import SolveFailed
from alps.core.phase_timer import PhaseTimer
from alps.core.progress import Progress
from alps.core.statistics import InputStats
from alps.models.blocks import Block
from alps.models.sites import Site
from alps.reporting.run_report import LayerRecord, solve_record
from alps.solvers.alps import Alps
from alps.solvers.base import Method, Solution
from alps.solvers.dense_target import shifted_weight, target_damping, target_shift
from alps.solvers.objective import relative_errors
from alps.solvers.patterns import MaskedPattern, Pattern, keep_largest, restrict_to_nonzeros
from alps.solvers.row_parallel import Rows
from alps.solvers.topk import apply_mask


@dataclass
class LayerSolver:
    """Prunes sites whose inputs were observed.

    Attributes:
        method, pattern, patterns, respect_zeros, measure_errors, target, watcher: as in `BlockPruner`.
        channels: by site, what its rows count (out,), see `row_weights.py`; rows of a site without count alike, and all
            of them where it is None.
        counted: whether calibration tokens were fed.
        shown: indices of the blocks whose solves are traced.
        phases: where the time goes.
        records: one for every site is added.
    """

    method: Method
    pattern: Pattern
    patterns: Mapping[str, Pattern]
    respect_zeros: bool
    measure_errors: bool
    target: float
    counted: bool
    shown: frozenset[int]
    progress: Progress
    phases: PhaseTimer
    records: list[LayerRecord]
    channels: Mapping[str, Tensor] | None = None

    def shared_input(self, block: Block, shared: LayerInput, rows: Rows | None = None) -> None:
        """Prune the sites of one input; with `rows`, together with other processes, each some rows of every site.

        The sums are let go of: rounded, they are held for the time of the solves.

        Raises:
            SolveFailed: when the inputs or an answer are not finite; names the sites.
        """
        shown = block.index in self.shown and not shared.sites[0].expert
        shift, method = None, self.method.traced() if shown else self.method
        with self.phases.measure("prepare"):
            stats = shared.sums.into_stats()
            _check(stats, block, shared)
        with self.phases.measure("prepare"), _naming(shared.sites):
            state = method.prepare(stats)
            if stats.input_shift is not None:
                shift = target_shift(stats, self.target, target_damping(stats.tokens))
        for index, site in enumerate(shared.sites):
            aim = site.read().to(torch.float32).clone()
            if shift is not None:
                aim = shifted_weight(aim, shift)
            pattern = self.patterns.get(site.name, self.pattern)
            if self.respect_zeros:
                pattern = restrict_to_nonzeros(pattern.base, site.read())
            with self.phases.measure("solve"), _naming([site]):
                solution = self._solved(method, site, aim, state, pattern, rows)
            stored = self._store(site, solution)
            # Of what several processes solve together each keeps the record of some sites.
            if rows is None or index % rows.size == rows.rank:
                self._record(block, site, aim, pattern, solution, stored, shared, stats)

    def told(self, record: LayerRecord) -> None:
        """A site is done, here or in another process."""
        self.progress.step(record.name + ("" if record.error is None else f"  error {record.error:.4f}"))

    def _solved(
        self, method: Method, site: Site, aim: Tensor, state: Any, pattern: Pattern, rows: Rows | None
    ) -> Solution:
        weights = None if self.channels is None else self.channels.get(site.name)
        # Rows share the Gram: weighed by d, they are the same problem for rows times sqrt(d).
        scale = None if weights is None else weights.sqrt()[:, None]
        wanted = aim if scale is None else aim * scale
        if rows is None:
            solution = method.solve(wanted, state, pattern)
        else:
            solution = _by_rows(method, wanted, state, pattern, rows)
        if scale is not None:
            solution.weight = solution.weight / scale
        elif self.channels is not None:
            solution.info.notes.append("its channels count alike: what they do to the block's output cannot be told")
        return solution

    @staticmethod
    def _store(site: Site, solution: Solution) -> Tensor:
        stored = site.write(solution.weight)
        if not bool(torch.isfinite(stored).all()):
            raise SolveFailed(
                f"Site {site.name}: pruned weights overflow {site.dtype}: run with --dtype bfloat16 or float32."
            )
        return stored

    def _record(
        self,
        block: Block,
        site: Site,
        aim: Tensor,
        pattern: Pattern,
        solution: Solution,
        stored: Tensor,
        shared: LayerInput,
        stats: InputStats,
    ) -> None:
        found = 0 if self.respect_zeros else None
        if isinstance(pattern, MaskedPattern):
            found = int(torch.count_nonzero(~pattern.allowed))
        for phase, seconds in solution.info.seconds.items():
            self.phases.add(phase, seconds)
        error = magnitude_error = None
        if self.measure_errors:
            with self.phases.measure("measure_error"):
                by_size = apply_mask(aim, keep_largest(aim.abs(), pattern))
                error, magnitude_error = relative_errors([stored.float(), by_size], aim, stats)
        solution.info.notes = [*solution.info.notes, *shared.notes]
        self.records.append(
            LayerRecord(
                name=site.name,
                block=block.index,
                kind=site.kind,
                shape=site.shape,
                entries=stored.numel(),
                zeros=int((stored == 0).sum()),
                error=error,
                magnitude_error=magnitude_error,
                solve=solve_record(solution.info),
                expert=site.expert,
                tokens=shared.tokens if self.counted else None,
                pooled_tokens=shared.pooled_tokens,
                pattern=str(pattern),
                zeros_before=found,
            )
        )
        self.told(self.records[-1])


def _by_rows(method: Method, aim: Tensor, state: Any, pattern: Pattern, rows: Rows) -> Solution:
    """Solve this process's rows of a matrix, and get the others' from them."""
    assert isinstance(method, Alps)
    bounds = [len(aim) * rank // rows.size for rank in range(rows.size + 1)]
    mine = slice(bounds[rows.rank], bounds[rows.rank + 1])
    solution = method.solve_rows(aim[mine], state, pattern, entries=aim.numel(), rows=rows)
    whole = torch.zeros_like(aim)
    whole[mine] = solution.weight
    solution.weight = rows.all_reduce_sum(whole)
    return solution


def _check(stats: InputStats, block: Block, shared: LayerInput) -> None:
    if not stats.is_finite():
        names = ", ".join(site.name for site in shared.sites)
        raise SolveFailed(
            f"Block {block.index}: the inputs of {names} hold NaN or infinite values: "
            "check the model's weights, or run with --dtype float32."
        )


@contextmanager
def _naming(sites: list[Site]) -> Iterator[None]:
    try:
        yield
    except SolveFailed as error:
        raise SolveFailed(f"Site {', '.join(site.name for site in sites)}: {error}.") from error
    except (RuntimeError, MemoryError) as error:
        error.add_note(f"Site {', '.join(site.name for site in sites)}")
        raise
