"""Solve the layers that read one input: make the problem, solve it, store the weights, measure the error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alps.calibration.moe_statistics import LayerInput
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.core.phase_timer import PhaseTimer
from alps.core.statistics import InputStats, relative_errors
from alps.models.blocks import Block
from alps.models.sites import Site
from alps.pruning.context import RunContext
from alps.pruning.recipe import PruneRecipe
from alps.reporting.run_report import LayerRecord, solve_record
from alps.solvers.alps import Alps
from alps.solvers.base import Method, Solution
from alps.solvers.dense_target import shifted_weight, target_damping, target_shift
from alps.solvers.patterns import MaskedPattern, Pattern, keep_largest, restrict_to_nonzeros
from alps.solvers.topk import apply_mask

_EQUAL: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class PreparedInput:
    """Statistics of one input, and what its layers share for their solves.

    Attributes:
        source: statistics as they were collected; its large sums are freed.
        stats: the same in float32.
        method: solver of the layers.
        state: of the method for these statistics, such as a factor.
        shift: change of the target for the dense reference, shape (in, in); None without a dense target.
    """

    source: LayerInput
    stats: InputStats
    method: Method
    state: Any
    shift: Tensor | None


@dataclass(frozen=True)
class LayerProblem:
    """Pruning problem of one layer.

    Attributes:
        site: layer to prune.
        inputs: of the layer, prepared for the method.
        target: weight whose outputs the layer reproduces, shape (out, in), float32.
        pattern: weights to keep.
        row_scale: square roots of the row weights, shape (out, 1), float32; None where all rows weigh the same.
    """

    site: Site
    inputs: PreparedInput
    target: Tensor
    pattern: Pattern
    row_scale: Tensor | None

    def solve(self, group: ProcessGroup) -> Solution:
        """Prune the target weight; with a group of several ranks each of them solves some of the rows.

        The rows share the Gram matrix, so that rows weighted by d are the same problem for rows times sqrt(d).

        Raises:
            SolveFailed: when the weights or the solution are not finite; names the layer.
        """
        target = self.target if self.row_scale is None else self.target * self.row_scale
        with _layer_names([self.site]):
            if group.size == 1:
                solution = self.inputs.method.solve(target, self.inputs.state, self.pattern)
            else:
                solution = _solve_shared_rows(self.inputs, target, self.pattern, group)
        if self.row_scale is not None:
            solution.weight = solution.weight / self.row_scale
        return solution

    def commit(self, solution: Solution) -> Tensor:
        """Store the solution in the model and return it as stored, shape (out, in), in the checkpoint's dtype.

        Raises:
            SolveFailed: when a weight overflows that dtype.
        """
        stored = self.site.write(solution.weight)
        if not bool(torch.isfinite(stored).all()):
            raise SolveFailed(
                f"Layer {self.site.name}: pruned weights overflow {self.site.dtype}: run with --dtype bfloat16 or "
                "float32."
            )
        return stored

    def errors(self, stored: Tensor) -> tuple[float, float]:
        """Return the relative reconstruction errors of the stored weights and of magnitude pruning."""
        magnitude = apply_mask(self.target, keep_largest(self.target.abs(), self.pattern))
        error, magnitude_error = relative_errors([stored.float(), magnitude], self.target, self.inputs.stats)
        return error, magnitude_error


@dataclass(frozen=True, kw_only=True)
class LayerSolver:
    """Solver of the layers of one block.

    Attributes:
        recipe: method, pattern and options.
        context: device, ranks and progress.
        patterns: of single layers by name, in place of the recipe's.
        traced: record the error of the iterates of the solves.
        timer: receives the wall time by phase.
        dense_share: share of the tokens whose inputs in the dense model are known.
    """

    recipe: PruneRecipe
    context: RunContext
    patterns: Mapping[str, Pattern]
    traced: bool
    timer: PhaseTimer
    dense_share: float = 1.0

    def solve_input(
        self,
        block: Block,
        source: LayerInput,
        row_weights: Mapping[str, Tensor] = _EQUAL,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> list[LayerRecord]:
        """Prune the layers that read one input, and free its sums.

        Args:
            block: that holds the layers.
            source: statistics of the input, the same on all ranks of `group`.
            row_weights: of single layers by name, shape (out,); see `alps.pruning.row_weights`.
            group: ranks that solve the layers together, each some rows of every layer.

        Returns:
            The records of the layers; of a group each rank returns those of some layers.

        Raises:
            SolveFailed: when inputs or solutions are not finite; names the layers.
        """
        inputs = self._prepare(block, source)
        records = []
        for index, site in enumerate(source.sites):
            problem = self._problem(site, inputs, row_weights.get(site.name))
            with self.timer.measure("solve"):
                solution = problem.solve(group)
            stored = problem.commit(solution)
            if index % group.size == group.rank:
                records.append(self._record(block, problem, solution, stored))
                self.report_progress(records[-1])
        return records

    def report_progress(self, record: LayerRecord) -> None:
        """Report a layer as done, on this rank or another."""
        self.context.progress.step(record.name + ("" if record.error is None else f"  error {record.error:.4f}"))

    def pattern_of(self, site: Site) -> Pattern:
        """Return the pattern of a layer before zeros that have to stay are counted."""
        return self.patterns.get(site.name, self.recipe.pattern)

    def _prepare(self, block: Block, source: LayerInput) -> PreparedInput:
        traced = self.traced and not source.sites[0].expert
        method = self.recipe.method.traced() if traced else self.recipe.method
        with self.timer.measure("prepare"):
            stats = source.sums.into_stats()
            check_finite_inputs(stats, block, source.sites)
        with self.timer.measure("prepare"), _layer_names(source.sites):
            state, shift = method.prepare(stats), None
            if stats.input_shift is not None:
                damping = target_damping(stats.tokens * self.dense_share)
                # The input shift is a sum over this share of the tokens, and the Gram one over all.
                shift = target_shift(stats, self.recipe.dense_target / self.dense_share, damping)
        return PreparedInput(source, stats, method, state, shift)

    def _problem(self, site: Site, inputs: PreparedInput, row_weights: Tensor | None) -> LayerProblem:
        target = site.read().to(torch.float32).clone()
        if inputs.shift is not None:
            target = shifted_weight(target, inputs.shift)
        pattern = self.pattern_of(site)
        if self.recipe.keep_zeros:
            pattern = restrict_to_nonzeros(pattern.base, site.read())
        row_scale = None if row_weights is None else row_weights.sqrt()[:, None]
        return LayerProblem(site, inputs, target, pattern, row_scale)

    def _record(self, block: Block, problem: LayerProblem, solution: Solution, stored: Tensor) -> LayerRecord:
        site, source, info = problem.site, problem.inputs.source, solution.info
        for phase, seconds in info.seconds.items():
            self.timer.add(phase, seconds)
        error = magnitude_error = None
        if self.recipe.measure_error:
            with self.timer.measure("measure_error"):
                error, magnitude_error = problem.errors(stored)
        if self.recipe.row_weights != "equal" and problem.row_scale is None:
            info.notes.append("its rows weigh the same: their effect on the block's output could not be measured")
        info.notes = [*info.notes, *source.notes]
        return LayerRecord(
            name=site.name,
            block=block.index,
            kind=site.kind,
            shape=site.shape,
            entries=stored.numel(),
            zeros=int((stored == 0).sum()),
            error=error,
            magnitude_error=magnitude_error,
            solve=solve_record(info),
            expert=site.expert,
            tokens=source.tokens if self.recipe.reads_inputs else None,
            pooled_tokens=source.pooled_tokens,
            pattern=str(problem.pattern),
            zeros_before=_zeros_before(problem.pattern) if self.recipe.keep_zeros else None,
        )


def _zeros_before(pattern: Pattern) -> int:
    return int(torch.count_nonzero(~pattern.allowed)) if isinstance(pattern, MaskedPattern) else 0


def _solve_shared_rows(inputs: PreparedInput, target: Tensor, pattern: Pattern, group: ProcessGroup) -> Solution:
    """Solve the rows of this rank, and collect those of the others."""
    assert isinstance(inputs.method, Alps)
    bounds = [len(target) * rank // group.size for rank in range(group.size + 1)]
    rows = slice(bounds[group.rank], bounds[group.rank + 1])
    solution = inputs.method.solve_rows(target[rows], inputs.state, pattern, entries=target.numel(), group=group)
    weight = torch.zeros_like(target)
    weight[rows] = solution.weight
    solution.weight = group.all_reduce_sum(weight)
    return solution


def check_finite_inputs(stats: InputStats, block: Block, sites: Sequence[Site]) -> None:
    """Refuse statistics of inputs with NaN or infinity.

    Args:
        stats: of the inputs that the sites share.
        block: of the sites.
        sites: that read the inputs.

    Raises:
        SolveFailed: naming the block and the sites.
    """
    if not stats.is_finite():
        names = ", ".join(site.name for site in sites)
        raise SolveFailed(
            f"Block {block.index}: the inputs of {names} hold NaN or infinite values: "
            "check the model's weights, or run with --dtype float32."
        )


@contextmanager
def _layer_names(sites: Sequence[Site]) -> Iterator[None]:
    """Context that puts the names of layers into the errors of their solves."""
    names = ", ".join(site.name for site in sites)
    try:
        yield
    except SolveFailed as error:
        raise SolveFailed(f"Layer {names}: {error}.") from error
    except (RuntimeError, MemoryError) as error:
        error.add_note(f"Layer {names}")
        raise
