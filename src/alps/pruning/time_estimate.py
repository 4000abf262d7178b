"""Measure forwards, Grams and solves on this machine for some seconds, before a run.

The block in the middle is run on a few hundred random tokens, and its layers are solved, smallest first, until the time
for that is spent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.layer_order import calibrate
from alps.core.device import exact_float32
from alps.core.half_precision import half_matmul_in_float32
from alps.core.phase_timer import PhaseTimer
from alps.core.progress import NoProgress
from alps.data.loaded_model import LoadedModel
from alps.models.blocks import Block, on_device
from alps.pruning.context import RunContext
from alps.pruning.layer_solver import LayerSolver
from alps.pruning.recipe import PruneRecipe

_TOKENS = 512
_SECONDS = 20.0


@dataclass
class BlockTimes:
    """Times of one block, in seconds per token unless stated otherwise.

    Attributes:
        forward: one pass of the block.
        observe: passes that collect statistics, without the Gram matrices.
        advance: pass that makes the inputs of the next block.
        gram: Gram matrices.
        solve: some solves, in seconds.
        cost: size of these solves in the unit of `solve_size`.
        inputs: features of every distinct input.
        cached: features that are kept of each part whose output is cached.
    """

    forward: float = 0.0
    observe: float = 0.0
    advance: float = 0.0
    gram: float = 0.0
    solve: float = 0.0
    cost: float = 0.0
    inputs: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


def solve_size(shape: tuple[int, int]) -> float:
    """Return the size of a solve of a layer (out, in), with which its time grows."""
    return float(shape[0] * shape[1] ** 2 + shape[1] ** 3)


def measure_block(
    loaded: LoadedModel, blocks: list[Block], recipe: PruneRecipe, context: RunContext, *, seqlen: int
) -> BlockTimes:
    """Run and solve a copy of one of the blocks; the model stays unchanged.

    Args:
        loaded: model that the blocks belong to.
        blocks: with the layers to prune.
        recipe: method, pattern and options.
        context: device.
        seqlen: tokens of a calibration window.

    Raises:
        UnsupportedModel: when the blocks cannot be walked.
    """
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    device, tokens = context.device, min(seqlen, _TOKENS)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    model, times = loaded.model.eval(), BlockTimes()
    inputs = capture_block_inputs(model, blocks, ids, 1)
    pruned = [block for block in blocks if block.sites]
    dense = pruned[len(pruned) // 2]
    with exact_float32(), half_matmul_in_float32(device, model), on_device(dense, device):
        block, forward = dense.clone(), inputs
        reference = DenseReference.start(inputs, needed=recipe.uses_dense_reference)
        reference.begin_block(dense)
        _timed_forward(inputs, block, device)
        times.forward = times.advance = _timed_forward(inputs, block, device) / tokens
        if recipe.true_sequential:
            forward = CachedForward(block, inputs, device, advances=recipe.reconstruction is None)
            # The search for cached parts takes one window: little in a run, and much here.
            forward.begin_pass([])
        start = time.perf_counter()
        observations = list(
            calibrate(block, forward, recipe.needs, device, true_sequential=recipe.true_sequential, reference=reference)
        )
        times.gram = sum(observation.seconds for observation in observations) / tokens
        times.observe = (time.perf_counter() - start) / tokens - times.gram
        sources = [source for observation in observations for source in observation.shared]
        times.inputs = [source.sites[0].shape[1] for source in sources]
        if isinstance(forward, CachedForward):
            times.cached = [max(part.last.shape) for part in forward.submodules or () if part.inputs or part.outputs]
            if recipe.reconstruction is None:
                forward.begin_pass([])
                times.advance = _timed_forward(forward, block, device) / tokens
        solver = LayerSolver(
            recipe=recipe,
            context=replace(context, progress=NoProgress()),
            patterns={},
            traced=True,
            timer=PhaseTimer(device),
        )
        begin = time.perf_counter()
        for source in sorted(sources, key=lambda source: solve_size(source.sites[0].shape)):
            start = time.perf_counter()
            solver.solve_input(block, source)
            times.solve += time.perf_counter() - start
            times.cost += sum(solve_size(site.shape) for site in source.sites)
            if time.perf_counter() - begin > _SECONDS:
                break
    return times


def _timed_forward(inputs: BlockInputs, block: Block, device: torch.device) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        inputs.run(block.index, block.module, 0, device)
    return time.perf_counter() - start
