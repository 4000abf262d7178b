"""Search for the mix of MLP width, heads and blocks that reaches a speed at the smallest divergence.

The times of a few structures are measured, and those of all others follow from them. Every candidate that is predicted
to be fast enough is then made by a quick pass on some of the calibration windows. The one whose predictions diverge
least from the dense model's, on windows that no pass has seen, is chosen.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs, batch_tokens
from alps.calibration.lm_head import LMHead
from alps.checkpoints.journal import Journal
from alps.core.device import exact_float32
from alps.core.errors import UnsupportedModel
from alps.core.half_precision import half_matmul_in_float32
from alps.core.kl_divergence import kl_divergence
from alps.models.blocks import Block, on_device
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.structure import Structure, Target
from alps.pruning.block_removal import choose_removals
from alps.pruning.latency import Runtime, fit_latency, measure_ratios
from alps.pruning.shrink_context import ShrinkContext, ShrinkJournal
from alps.pruning.shrink_pipeline import ShrinkRun, shrink_blocks, small_block
from alps.pruning.speedup_candidates import Choices, list_candidates
from alps.reporting.shrink_report import BlockRemoval, CandidateRecord, LatencyRecord, SpeedupRecord

_LOG = logging.getLogger("alps")

# Tokens that a candidate is fitted to, and tokens on which its predictions are compared.
_FITTED_TOKENS, _HELD_OUT_TOKENS = 16384, 4096
# Tokens for the choice of blocks, which runs all candidates in every round.
_REMOVAL_TOKENS = 1024
_SCRATCH = "candidate"


@dataclass(frozen=True, kw_only=True)
class SpeedupSearch:
    """Model, wanted speed and means of a search.

    Attributes:
        model: dense, in evaluation mode.
        blocks: of the model.
        speed: speed in units of the dense model's.
        runtime_name, runtime: in which times are measured.
        choices: numbers of units that mixes are made of.
    """

    model: nn.Module
    blocks: list[Block]
    speed: float
    runtime_name: str
    runtime: Runtime
    choices: Choices

    @property
    def structure(self) -> Structure:
        """Structure of the dense model."""
        return self.choices.structure

    def predict(self, on_step: Callable[[str], None] = lambda _: None) -> SpeedupRecord:
        """Measure times, and list the mixes that are predicted to be fast enough.

        Args:
            on_step: called after each measured structure.

        Raises:
            ConfigError: when no mix is.
        """
        probes = self.choices.probes()
        ratios = self._measure(probes, on_step)
        fit = fit_latency(self.structure, probes, ratios)
        return SpeedupRecord(
            speed=self.speed,
            runtime=self.runtime_name,
            latencies=[_latency(target, ratio) for target, ratio in zip(probes, ratios, strict=True)],
            candidates=list_candidates(self.choices, fit, self.speed),
            removals=[],
            fitted_tokens=0,
            held_out_tokens=0,
        )

    def measure(self, target: Target) -> float:
        """Measure the speed of one structure, in turns with the dense model."""
        return 1 / self._measure([target], lambda _: None)[0]

    def target(self, candidate: CandidateRecord, removals: list[BlockRemoval]) -> Target:
        """Return the complete numbers of units of a candidate."""
        removed = {removal.block for removal in removals[: candidate.removed]}
        kept = tuple(index for index in range(self.structure.blocks) if index not in removed)
        mix = Target(mlp_width=candidate.mlp_width or None, heads=candidate.heads or None, kept_blocks=kept)
        return mix.complete(self.structure)

    def _measure(self, targets: list[Target], on_step: Callable[[str], None]) -> list[float]:
        smaller = (empty_shrunk_model(self.model, self.blocks, target) for target in targets)
        dense = empty_shrunk_model(self.model, self.blocks, Target())
        return measure_ratios(self.runtime, dense, smaller, lambda ratio: on_step(f"{1 / ratio:.2f} times as fast"))


def choose_mix(
    search: SpeedupSearch,
    ids: Tensor,
    context: ShrinkContext,
    make_run: Callable[[Target, ShrinkContext], ShrinkRun],
) -> SpeedupRecord:
    """Choose a mix, or return the one that the journal holds; an interrupted search continues there.

    The main rank measures and decides; all ranks take part in the quick passes.

    Args:
        search: model and wanted speed.
        ids: calibration windows (windows, tokens), two or more.
        context: of the run.
        make_run: returns a run without block reconstruction for a target.

    Raises:
        ConfigError: when no mix reaches the speed.
        SolveFailed, CheckpointError: from the quick passes.
    """
    held_out = ids[-min(max(_HELD_OUT_TOKENS // ids.shape[1], 1), max(len(ids) // 4, 1)) :]
    fitted = ids[: len(ids) - len(held_out)][: max(_FITTED_TOKENS // ids.shape[1], 1)]
    record: SpeedupRecord = context.group.broadcast_from_main(
        lambda: context.journal.load_speedup() or _begin(search, fitted, held_out, context)
    )
    context.journal.save_speedup(record)
    candidates = list(record.candidates)
    reference: _Reference | None = None
    for number, candidate in enumerate(candidates):
        if candidate.kl is not None:
            continue
        if reference is None and context.group.is_main:
            reference = _Reference.of(search, held_out, context.device)
        kl = _measure_candidate(search.target(candidate, record.removals), fitted, reference, context, make_run)
        candidates[number] = candidate.model_copy(update={"kl": kl})
        if context.group.is_main:
            _LOG.info("Candidate %d of %d: %s.", number + 1, len(candidates), candidates[number].describe())
        record = record.model_copy(update={"candidates": candidates})
        context.journal.save_speedup(record)
    return record


def _begin(search: SpeedupSearch, fitted: Tensor, held_out: Tensor, context: ShrinkContext) -> SpeedupRecord:
    """List the candidates, and choose as many blocks as the shortest of them removes."""
    with _progress(context, "measure latency", len(search.choices.probes())):
        record = search.predict(context.progress.step)
    count = max(candidate.removed for candidate in record.candidates)
    removals = list[BlockRemoval]()
    if count:
        with _progress(context, "choose blocks", count * len(search.blocks)):
            removals = choose_removals(
                search.model,
                search.blocks,
                fitted[: max(_REMOVAL_TOKENS // fitted.shape[1], 1)],
                count,
                device=context.device,
                on_block_done=lambda _: context.progress.step(""),
            )
    candidates = list(_buildable(search, record.candidates, removals))
    return record.model_copy(
        update={
            "candidates": candidates,
            "removals": removals,
            "fitted_tokens": fitted.numel(),
            "held_out_tokens": held_out.numel(),
        }
    )


def _buildable(
    search: SpeedupSearch, candidates: list[CandidateRecord], removals: list[BlockRemoval]
) -> Iterator[CandidateRecord]:
    """Yield the candidates whose chosen blocks may go; the kinds of blocks may depend on their numbers."""
    refusal: UnsupportedModel | None = None
    count = 0
    for candidate in candidates:
        try:
            empty_shrunk_model(search.model, search.blocks, search.target(candidate, removals))
        except UnsupportedModel as error:
            refusal = error
        else:
            count += 1
            yield candidate
    if not count and refusal is not None:
        raise refusal


@dataclass(frozen=True)
class _Reference:
    """Held-out windows in the dense model.

    Attributes:
        windows: token ids (windows, tokens).
        inputs: of the first block.
        outputs: of the last block, batch by batch.
        head: part of the model after the blocks, which shrinking leaves unchanged.
    """

    windows: Tensor
    inputs: BlockInputs
    outputs: list[Tensor]
    head: LMHead

    @classmethod
    def of(cls, search: SpeedupSearch, windows: Tensor, device: torch.device) -> _Reference:
        """Run the windows through the dense model."""
        size = max(batch_tokens(search.blocks, device) // windows.shape[1], 1)
        inputs = capture_block_inputs(search.model, search.blocks, windows, size)
        dense = inputs.copy()
        with exact_float32(), half_matmul_in_float32(device, search.model), torch.no_grad():
            for block in search.blocks:
                with on_device(block, device):
                    dense.advance(block.index, block.module, device)
        return cls(windows, inputs, dense.hidden, LMHead(search.model, search.blocks, inputs.calls.layout))

    def divergence(self, run: ShrinkRun, device: torch.device) -> float:
        """Return mean KL(dense || smaller) per token, in nats, of a run whose blocks are all in its journal."""
        states, total = self.inputs.copy(), 0.0
        with exact_float32(), half_matmul_in_float32(device, run.model, run.shrunk.model), torch.no_grad():
            for position, index in enumerate(run.cutter.target.kept_blocks or ()):
                small = small_block(run, position)
                run.context.journal.restore(position, small, device)
                states.advance(index, small.module, device)
                run.shrunk.release(position)
            batches = torch.split(self.windows, [len(hidden) for hidden in states.hidden])
            with self.head.on(device):
                for hidden, dense, ids in zip(states.hidden, self.outputs, batches, strict=True):
                    logits, goal = (self.head(outputs, ids).flatten(0, -2) for outputs in (hidden, dense))
                    total += float(kl_divergence(logits, goal, self.windows.numel()))
        return total


def _measure_candidate(
    target: Target,
    fitted: Tensor,
    reference: _Reference | None,
    context: ShrinkContext,
    make_run: Callable[[Target, ShrinkContext], ShrinkRun],
) -> float:
    """Make a candidate by a quick pass, and return its divergence, which the main rank measures by its reference."""

    def measure() -> float:
        assert reference is not None
        return reference.divergence(run, context.device)

    with _scratch_journal(context) as journal:
        run = make_run(target, replace(context, journal=journal))
        shrink_blocks(run, fitted)
        divergence: float = context.group.broadcast_from_main(measure)
    return divergence


@contextmanager
def _scratch_journal(context: ShrinkContext) -> Iterator[ShrinkJournal]:
    """Context of an empty journal inside that of the run, which is removed afterwards."""
    group, folder = context.group, context.journal.journal.directory / _SCRATCH

    def empty() -> None:
        if group.is_main:
            shutil.rmtree(folder, ignore_errors=True)

    empty()
    if group.is_main:
        folder.mkdir()
    group.barrier()
    try:
        yield ShrinkJournal(Journal(folder, {}, {}), group)
        group.barrier()
    finally:
        empty()


@contextmanager
def _progress(context: ShrinkContext, title: str, total: int) -> Iterator[None]:
    context.progress.start(title, total)
    try:
        yield
    finally:
        context.progress.finish()


def _latency(target: Target, ratio: float) -> LatencyRecord:
    return LatencyRecord(
        blocks=len(target.kept_blocks or ()), mlp_width=target.mlp_width or 0, heads=target.heads or 0, ratio=ratio
    )
