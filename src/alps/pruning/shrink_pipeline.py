"""Shrink the blocks of a model in order, each on the activations that the smaller blocks before it produce.

The dense model's hidden states pass through the dense blocks meanwhile. A block is fitted to the dense hidden states
behind it, or behind the removed blocks that follow it, so that the gap of a removed block is patched by the output
projections before it. The smaller block is then tuned as a whole, with `--reconstruct-epochs`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs
from alps.core.errors import SolveFailed
from alps.core.phase_timer import PhaseTimer
from alps.data.loaded_model import LoadedModel
from alps.finetuning.block_reconstruction import OutputLoss, reconstruct_block, relative_loss
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block, on_device
from alps.models.shrink_families import adds_output, family_of
from alps.models.shrink_slices import slice_block
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel, fill_module
from alps.models.structure import Structure, Target
from alps.pruning.first_inputs import capture_first_inputs
from alps.pruning.shrink_context import ShrinkContext
from alps.pruning.shrink_experts import ExpertCut
from alps.pruning.shrink_layers import BlockStates, Cutter
from alps.reporting.records import ReconstructionRecord
from alps.reporting.shrink_report import CutRecord, ExpertSelection, ShrunkBlock


@dataclass(frozen=True, kw_only=True)
class ShrinkRun:
    """Models of a run, and how the blocks are shrunk.

    Attributes:
        model: dense, in evaluation mode; its blocks are left unchanged.
        blocks: all blocks of the dense model in order.
        shrunk: the smaller model, without weights.
        cutter: of heads and channels.
        reconstruction: parameters of block reconstruction; None leaves it out.
        context: device, ranks, journal.
    """

    model: nn.Module
    blocks: Sequence[Block]
    shrunk: ShrunkModel
    cutter: Cutter
    reconstruction: ReconstructionParameters | None
    context: ShrinkContext


def make_run(
    loaded: LoadedModel,
    structure: Structure,
    target: Target,
    context: ShrinkContext,
    *,
    small: ShrunkModel | None = None,
    experts: ExpertSelection | None = None,
    reconstruction: ReconstructionParameters | None = None,
) -> ShrinkRun:
    """Return a run for a complete target; the smaller model is built unless it is given."""
    model, blocks = loaded.model, loaded.blocks()
    return ShrinkRun(
        model=model,
        blocks=blocks,
        shrunk=small or ShrunkModel.of(empty_shrunk_model(model, blocks, target)),
        cutter=Cutter(
            family=family_of(model),
            structure=structure,
            target=target,
            adds_output=adds_output(model),
            device=context.device,
            group=context.group,
            experts=ExpertCut(structure, target, {} if experts is None else experts.kept),
        ),
        reconstruction=reconstruction,
        context=context,
    )


def shrink_blocks(run: ShrinkRun, windows: Tensor) -> tuple[list[ShrunkBlock], dict[str, float]]:
    """Shrink every block that stays, and keep it in the journal.

    Args:
        run: models and options.
        windows: calibration token ids (windows, tokens).

    Returns:
        The records of the blocks, and the wall time by phase.

    Raises:
        SolveFailed: when activations or solutions are not finite; names the layer.
        CheckpointError: when a finished block cannot be kept, or is damaged.
    """
    timer = PhaseTimer(run.context.device)
    with run.context.computation(run.model, run.shrunk.model), torch.no_grad():
        kept = run.cutter.target.kept_blocks or ()
        run.context.progress.start("shrink", len(kept))
        try:
            records = _shrink_in_order(run, windows, timer)
        finally:
            run.context.progress.finish()
    return records, timer.seconds


def _shrink_in_order(run: ShrinkRun, windows: Tensor, timer: PhaseTimer) -> list[ShrunkBlock]:
    kept = list(run.cutter.target.kept_blocks or ())
    journal, device = run.context.journal, run.context.device
    if journal.finished == len(kept):
        return [journal.record(position) for position in range(len(kept))]
    with timer.measure("capture"):
        dense, output_loss = capture_first_inputs(run.model, run.blocks, windows, run.context, run.reconstruction)
    states, records = dense.copy(), list[ShrunkBlock]()
    for index in range(kept[0]):
        with timer.measure("forward"):
            _advance(run.blocks[index], dense, device)
    for position, index in enumerate(kept):
        block, following = run.blocks[index], kept[position + 1] if position + 1 < len(kept) else len(run.blocks)
        is_last = position == len(kept) - 1
        small = small_block(run, position)
        record = journal.restore(position, small, device)
        if record is None:
            loss = output_loss if is_last else None
            record = _shrink_block(
                run, block, small, run.blocks[index + 1 : following], states, dense, output_loss=loss
            )
            with timer.measure("journal"):
                journal.save(position, small.module, record)
        elif not is_last:
            with timer.measure("forward"):
                states.advance(index, small.module, device)
                for skipped in run.blocks[index:following]:
                    _advance(skipped, dense, device)
        for phase, seconds in record.seconds.items():
            if phase != "total":
                timer.add(phase, seconds)
        records.append(record)
        run.shrunk.release(position)
        run.context.progress.step(f"block {index}  error {record.error:.4f}")
    return records


def _shrink_block(
    run: ShrinkRun,
    block: Block,
    small: Block,
    gap: Sequence[Block],
    states: BlockInputs,
    dense: BlockInputs,
    *,
    output_loss: OutputLoss | None,
) -> ShrunkBlock:
    """Cut and refit one block, fill the smaller one with the result, and tune it.

    Args:
        run: models and options.
        block: of the dense model.
        small: its counterpart in the smaller model; gets weights here.
        gap: removed blocks behind it.
        states: inputs of the block in the smaller model; advanced here.
        dense: inputs of the block in the dense model; advanced past the gap here.
        output_loss: for the last block, loss of the model's predictions.
    """
    start, device, timer = time.perf_counter(), run.context.device, PhaseTimer(run.context.device)
    with on_device(block, device):
        # A model in memory keeps its weights.
        work = block if block.store is not None else block.clone()
        with timer.measure("forward"):
            dense_sites, dense_inputs = run.cutter.record_dense(work, dense)
            for skipped in gap:
                _advance(skipped, dense, device)
        with timer.measure("cut"):
            kept, cuts = run.cutter.cut(
                work,
                BlockStates(
                    inputs=states, dense_inputs=dense_inputs, dense_sites=dense_sites, dense_outputs=dense.hidden
                ),
            )
        tensors = slice_block(work.module.state_dict(), run.cutter.family, run.cutter.structure, kept)
        fill_module(small.module, tensors, device)
        reconstruction = None
        if run.reconstruction is not None:
            with timer.measure("reconstruct"):
                reconstruction = reconstruct_block(
                    small,
                    states,
                    dense.hidden,
                    run.reconstruction,
                    device=device,
                    output_loss=output_loss,
                    group=run.context.group,
                )
    with timer.measure("forward"):
        states.advance(block.index, small.module, device)
        error = _distance(states, dense, run.context)
    if not math.isfinite(error):
        raise SolveFailed(f"{block.name}: the hidden states behind it are not finite; run with --dtype float32.")
    return _record(block, cuts, error, reconstruction, timer, start)


def _record(
    block: Block,
    cuts: list[CutRecord],
    error: float,
    reconstruction: ReconstructionRecord | None,
    timer: PhaseTimer,
    start: float,
) -> ShrunkBlock:
    seconds = {**timer.seconds, "total": time.perf_counter() - start}
    return ShrunkBlock(block=block.index, cuts=cuts, error=error, reconstruction=reconstruction, seconds=seconds)


def _distance(states: BlockInputs, dense: BlockInputs, context: ShrinkContext) -> float:
    """Return the mean over all tokens of the relative squared distance from the dense hidden states."""
    total = torch.zeros(2, dtype=torch.float64)
    for hidden, goal in zip(states.hidden, dense.hidden, strict=True):
        for window, target in zip(hidden, goal, strict=True):
            total += torch.tensor([float(relative_loss(window, target)), 1.0], dtype=torch.float64)
    total = context.group.all_reduce_sum(total)
    return float(total[0] / total[1])


def small_block(run: ShrinkRun, position: int) -> Block:
    """Return a block of the smaller model, with the index of its counterpart, whose arguments it is called with."""
    small, index = run.shrunk.blocks[position], (run.cutter.target.kept_blocks or ())[position]
    return replace(small, index=index, frozen=run.blocks[index].frozen)


def _advance(block: Block, states: BlockInputs, device: torch.device) -> None:
    with on_device(block, device):
        states.advance(block.index, block.module, device)
