"""What tokens and solves take on this machine, from seconds of measurement before a run.

The block in the middle is run on a few hundred random tokens and its sites are solved, smallest first, until the time
for that is spent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from alps.calibration.block_inputs import BlockInputs, capture_block_inputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.layer_order import observations
from alps.core.device import exact_float32
from alps.core.half_precision import half_matmul_in_float32
from alps.core.phase_timer import PhaseTimer
from alps.data.calibration import LoadedModel
from alps.models.blocks import Block, on_device
from alps.pruning.pipeline import BlockPruner

_TOKENS = 512
_SECONDS = 20.0


@dataclass
class Measured:
    """One block, in seconds a token where nothing else is said.

    Attributes:
        forward, observe, advance, gram: one pass of the block, its observations without the Grams, the step to the next
            block, and the Grams.
        solve, cost: seconds that some solves took, and their size as `cost` has it.
        inputs: features of every distinct input.
        settled: features that are kept of each part that passes go on behind.
    """

    forward: float = 0.0
    observe: float = 0.0
    advance: float = 0.0
    gram: float = 0.0
    solve: float = 0.0
    cost: float = 0.0
    inputs: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)


def cost(shape: tuple[int, int]) -> float:
    """What a solve of a site (out, in) grows with."""
    return float(shape[0] * shape[1] ** 2 + shape[1] ** 3)


def measure(loaded: LoadedModel, walk: BlockPruner, blocks: list[Block], seqlen: int) -> Measured:
    """Run and solve one of the blocks; nothing is changed.

    Raises:
        UnsupportedModel: when the blocks cannot be walked.
    """
    vocabulary, tokens = loaded.model.get_input_embeddings().num_embeddings, min(seqlen, _TOKENS)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    model = loaded.model.eval()
    inputs, found, pruned = (
        capture_block_inputs(model, blocks, ids, 1),
        Measured(),
        [block for block in blocks if block.sites],
    )
    block = pruned[len(pruned) // 2]
    with exact_float32(), half_matmul_in_float32(walk.device, model), on_device(block, walk.device):
        # Solves write into a copy.
        copy, walks_dense = block.clone(), walk.target > 0 or walk.matching is not None
        _timed_forward(inputs, copy, walk)
        found.forward = _timed_forward(inputs, copy, walk) / tokens
        dense = DenseReference(block, inputs.beside()) if walks_dense else None
        rest = inputs
        if walk.order == "sequential":
            rest = settled = CachedForward(copy, inputs, walk.device, walk.matching is None)
            # Learning from one window is little in a run, and would be much here.
            settled.expect([])
        start = time.perf_counter()
        seen = list(observations(copy, rest, walk.needs, walk.device, walk.order, dense))
        found.gram = sum(one.seconds for one in seen) / tokens
        found.observe = (time.perf_counter() - start) / tokens - found.gram
        shared = [one for observation in seen for one in observation.shared]
        found.inputs = [one.sites[0].shape[1] for one in shared]
        found.advance = found.forward
        if isinstance(rest, CachedForward):
            found.settled = [max(part.last.shape) for part in rest.parts or () if part.received or part.given]
            if walk.matching is None:
                rest.expect([])
                found.advance = _timed_forward(rest, copy, walk) / tokens
        solver = walk.solver(blocks, PhaseTimer(walk.device), [])
        spent = time.perf_counter()
        for one in sorted(shared, key=lambda one: cost(one.sites[0].shape)):
            start = time.perf_counter()
            solver.shared_input(copy, one)
            found.solve += time.perf_counter() - start
            found.cost += sum(cost(site.shape) for site in one.sites)
            if time.perf_counter() - spent > _SECONDS:
                break
    return found


def _timed_forward(inputs: BlockInputs, block: Block, walk: BlockPruner) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        inputs.run(block.index, block.module, 0, walk.device)
    return time.perf_counter() - start
