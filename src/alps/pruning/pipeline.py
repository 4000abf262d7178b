"""Prune the blocks of a model in order, each on the activations that the pruned blocks before it produce.

One pass over the calibration batches collects the inputs of a block's layers; the layers are solved and stored; a
second pass turns the batches into the inputs of the next block. True-sequential runs make one pass for every input, so
that each layer is solved on the pruned layers before it. A dense target or block reconstruction needs the dense
model's activations as well, from a dense copy of one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.layer_order import calibrate
from alps.core.phase_timer import PhaseTimer
from alps.finetuning.block_reconstruction import OutputLoss, reconstruct_block
from alps.models.blocks import Block, on_device
from alps.pruning.context import RunContext
from alps.pruning.first_inputs import DensePrefix, capture_first_inputs
from alps.pruning.layer_rules import AppliedRules
from alps.pruning.layer_solver import LayerSolver
from alps.pruning.recipe import PruneRecipe
from alps.pruning.resume import BlockResult
from alps.pruning.row_weights import compute_row_weights
from alps.pruning.sparsity_allocation import allocate_sparsity, check_fit
from alps.pruning.work_distribution import solve_layers
from alps.reporting.records import ReconstructionRecord
from alps.reporting.run_report import DenseRecord, LayerRecord
from alps.solvers.patterns import Pattern


@dataclass(frozen=True)
class BlockResults:
    """Outcome of a run over all blocks.

    Attributes:
        layers: records of all pruned layers, block by block in the order of the forward.
        reconstructions: one record for each block, or none.
        dense: parameters that were left dense, with the reason.
        seconds: wall time by phase, with that of blocks that an earlier process finished.
        earlier_seconds: wall time in all of those blocks.
    """

    layers: list[LayerRecord]
    reconstructions: list[ReconstructionRecord]
    dense: list[DenseRecord]
    seconds: dict[str, float]
    earlier_seconds: float


def prune_blocks(
    model: nn.Module, blocks: list[Block], windows: Tensor | None, recipe: PruneRecipe, context: RunContext
) -> BlockResults:
    """Prune every layer of the blocks that the recipe does not keep dense, in place where the model is in memory.

    Args:
        model: that the blocks belong to, in evaluation mode.
        blocks: all decoder blocks in order.
        windows: calibration token ids (windows, tokens); None only for a recipe that reads no inputs.
        recipe: method, pattern and options.
        context: device, ranks, journal.

    Raises:
        ConfigError: when a rule names nothing, or the pattern does not fit a layer.
        SolveFailed: when activations or solutions are not finite; names the block or the layer.
        CheckpointError: when a finished block cannot be kept, or is damaged.
    """
    applied = recipe.rules.apply(model, blocks)
    check_fit(applied.blocks, recipe.pattern, applied.patterns)
    assert windows is not None or not recipe.reads_inputs, "windows are missing"
    if not recipe.reads_inputs or context.journal.is_finished(blocks[-1]):
        windows = None
    timer = PhaseTimer(context.device)
    restorable = sum(context.journal.is_finished(block) for block in applied.blocks)
    with context.computation(model):
        patterns = _layer_patterns(model, applied, windows, recipe, context, timer)
        with _progress(applied.blocks, recipe, context):
            results = _prune_in_order(
                model, applied.blocks, windows, patterns=patterns, recipe=recipe, context=context, timer=timer
            )
    for result in results:
        for phase, seconds in result.seconds.items():
            if phase != "total":
                timer.add(phase, seconds)
    layers = [layer for result in results for layer in result.layers]
    return BlockResults(
        layers=layers,
        reconstructions=[result.reconstruction for result in results if result.reconstruction is not None],
        dense=applied.dense(model, blocks, {layer.name for layer in layers}),
        seconds=timer.seconds,
        earlier_seconds=sum(result.seconds.get("total", 0.0) for result in results[:restorable]),
    )


def _prune_in_order(
    model: nn.Module,
    blocks: list[Block],
    windows: Tensor | None,
    *,
    patterns: Mapping[str, Pattern],
    recipe: PruneRecipe,
    context: RunContext,
    timer: PhaseTimer,
) -> list[BlockResult]:
    """Prune the blocks one after the other, or restore them from the journal."""
    device, traced = context.device, _traced_blocks(blocks)
    with timer.measure("capture"):
        inputs, output_loss = _first_inputs(model, blocks, windows, recipe, context)
    prefix = DensePrefix()
    if windows is not None:
        prefix = DensePrefix.of(len(windows), windows.shape[1], recipe.reconstruction, context.group.size)
    reference = DenseReference.start(inputs, needed=recipe.uses_dense_reference, batches=prefix.batches)
    results: list[BlockResult] = []
    for block in blocks:
        is_last = block is blocks[-1]
        with on_device(block, device):
            reference.begin_block(block)
            forward = _forward_of(block, inputs, recipe, device, is_last)
            result = _restore(block, context)
            if result is None:
                solver = LayerSolver(
                    recipe=recipe,
                    context=context,
                    patterns=patterns,
                    traced=block.index in traced,
                    timer=PhaseTimer(device),
                    dense_share=prefix.share,
                )
                loss = output_loss if is_last else None
                result = _prune_block(
                    block, solver, inputs=inputs, forward=forward, reference=reference, output_loss=loss
                )
                with timer.measure("journal"):
                    context.journal.save(block, result)
            results.append(result)
            if not is_last:
                with timer.measure("forward"):
                    reference.advance(device)
                    # Reconstruction changes weights that the cached outputs of `forward` are made of.
                    following = forward if recipe.reconstruction is None else inputs
                    following.advance(block.index, block.module, device)
    return results


def _prune_block(
    block: Block,
    solver: LayerSolver,
    *,
    inputs: BlockInputs,
    forward: BlockInputs,
    reference: DenseReference,
    output_loss: OutputLoss | None,
) -> BlockResult:
    """Prune the layers of a block on its device, and reconstruct its outputs if the recipe asks for that.

    Args:
        block: dense, on its device.
        solver: of its layers.
        inputs: of the block in the pruned model.
        forward: the same inputs, which may cache parts of the block.
        reference: activations of the dense model.
        output_loss: for the last block, loss of the model's predictions.
    """
    start = time.perf_counter()
    recipe, context, timer = solver.recipe, solver.context, solver.timer
    row_weights: dict[str, Tensor] = {}
    if recipe.row_weights != "equal":
        with timer.measure("row_weights"):
            row_weights = compute_row_weights(block, inputs, context.device, context.group)
    observations = calibrate(
        block,
        forward,
        recipe.needs,
        context.device,
        true_sequential=recipe.true_sequential,
        reference=reference,
        group=context.group,
    )
    layers: list[LayerRecord] = []
    for observation in timer.measure_observations(observations):
        layers += solve_layers(solver, block, observation.shared, row_weights)
    reconstruction = None
    if recipe.reconstruction is not None:
        with timer.measure("forward"):
            reference.advance(context.device)
        with timer.measure("reconstruct"):
            reconstruction = reconstruct_block(
                block,
                inputs,
                reference.outputs,
                recipe.reconstruction,
                device=context.device,
                output_loss=output_loss,
                group=context.group,
                dense_block=reference.block,
            )
    seconds = {**timer.seconds, "total": time.perf_counter() - start}
    return BlockResult(layers=layers, reconstruction=reconstruction, seconds=seconds)


def _layer_patterns(
    model: nn.Module,
    applied: AppliedRules,
    windows: Tensor | None,
    recipe: PruneRecipe,
    context: RunContext,
    timer: PhaseTimer,
) -> Mapping[str, Pattern]:
    """Return the patterns of single layers by name, from rules and from the allocation of the sparsity."""
    if windows is None or recipe.allocation == "uniform":
        return applied.patterns
    free = [block.with_sites([s for s in block.sites if s.name not in applied.patterns]) for block in applied.blocks]
    with timer.measure("allocation"):
        patterns = context.journal.load_allocation()
        if patterns is None:
            patterns = context.group.broadcast_from_main(
                lambda: allocate_sparsity(model, free, windows, recipe, context)
            )
            context.journal.save_allocation(patterns)
    return {**patterns, **applied.patterns}


def _first_inputs(
    model: nn.Module, blocks: list[Block], windows: Tensor | None, recipe: PruneRecipe, context: RunContext
) -> tuple[BlockInputs, OutputLoss | None]:
    if windows is None:
        return BlockInputs([]), None
    return capture_first_inputs(model, blocks, windows, context, recipe.reconstruction)


def _forward_of(
    block: Block, inputs: BlockInputs, recipe: PruneRecipe, device: torch.device, is_last: bool
) -> BlockInputs:
    """Return inputs that cache what is pruned already in a true-sequential run, else the inputs themselves."""
    if not recipe.true_sequential or not inputs.hidden:
        return inputs
    return CachedForward(block, inputs, device, advances=recipe.reconstruction is None and not is_last)


def _traced_blocks(blocks: list[Block]) -> set[int]:
    """Return the indices of the blocks whose solves a report shows: the first, the middle and the last."""
    return {blocks[position].index for position in (0, len(blocks) // 2, -1)}


@contextmanager
def _progress(blocks: list[Block], recipe: PruneRecipe, context: RunContext) -> Iterator[None]:
    """Context of one step of progress for every layer."""
    context.progress.start(f"{recipe.method.name} {recipe.pattern}", sum(len(block.sites) for block in blocks))
    try:
        yield
    finally:
        context.progress.finish()


def _restore(block: Block, context: RunContext) -> BlockResult | None:
    """Restore a block that is finished in the journal, and report its layers as done; None for any other block."""
    result = context.journal.restore(block)
    if result is not None:
        for layer in result.layers:
            context.progress.step(f"{layer.name}  restored")
    return result
