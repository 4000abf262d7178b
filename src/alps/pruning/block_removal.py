"""Choice of whole blocks to remove: greedy, by the divergence of the predictions that is measured after every removal.

Scores of single removals do not add up: two blocks that can each be spared alone may not be spared together. After
every removal, all candidates are therefore measured again, on the model without the blocks that went before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.lm_head import LMHead
from alps.core.device import exact_float32
from alps.core.half_precision import half_matmul_in_float32
from alps.core.kl_divergence import kl_divergence
from alps.core.memory import out_of_memory_as_error
from alps.models.blocks import Block, on_device
from alps.reporting.shrink_report import BlockRemoval

# Tokens on which removals are compared; more change the order of near ties only.
REMOVAL_TOKENS = 4096
# Blocks at either end that are never candidates: the first ones build the hidden states, the last ones the predictions.
PROTECTED_ENDS = 2
_MEMORY_HINT = "use --dtype bfloat16, or name the blocks with --drop-blocks"


def choose_removals(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    count: int,
    *,
    device: torch.device,
    activations: ActivationStore | None = None,
    on_block_done: Callable[[Block], None] = lambda _: None,
) -> list[BlockRemoval]:
    """Choose blocks to remove, one after the other, each the one whose removal changes the predictions least.

    Args:
        model: in evaluation mode; left unchanged.
        blocks: its decoder blocks.
        windows: token ids (windows, tokens); the first `REMOVAL_TOKENS` are used.
        count: number of blocks to remove.
        device: where the blocks run.
        activations: storage of the hidden states.
        on_block_done: called after the last run of a block, in each of the `count` rounds.

    Returns:
        The removals in their order, each with the divergence KL(dense || shrunk) in nats after it.
    """
    windows = windows[: max(REMOVAL_TOKENS // windows.shape[1], 1)]
    candidates = removable(len(blocks))
    assert count <= len(candidates)
    removals = list[BlockRemoval]()
    with out_of_memory_as_error(_MEMORY_HINT), exact_float32(), half_matmul_in_float32(device, model):
        inputs = capture_block_inputs(model, blocks, windows, len(windows), activations=activations)
        for _ in range(count):
            removed = [removal.block for removal in removals]
            divergences = _measure_round(
                model,
                blocks,
                windows,
                inputs,
                removed=removed,
                candidates=[index for index in candidates if index not in removed],
                device=device,
                on_block_done=on_block_done,
            )
            best = min(divergences, key=lambda index: (divergences[index], index))
            removals.append(BlockRemoval(block=best, kl=divergences[best]))
    return removals


def removable(count: int) -> list[int]:
    """Return the indices of the candidates among `count` blocks."""
    return list(range(PROTECTED_ENDS, count - PROTECTED_ENDS))


def _measure_round(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    inputs: BlockInputs,
    *,
    removed: Collection[int],
    candidates: Collection[int],
    device: torch.device,
    on_block_done: Callable[[Block], None],
) -> dict[int, float]:
    """Return the divergence from the dense model for every candidate, removed together with the blocks before it.

    Every block is loaded once. The streams of hidden states of all earlier candidates run through it.
    """
    dense, base, streams = inputs.copy(), inputs.copy(), dict[int, BlockInputs]()
    with torch.no_grad():
        for block in blocks:
            with on_device(block, device):
                if block.index in candidates:
                    streams[block.index] = base.copy()
                for index, stream in streams.items():
                    if index != block.index and block.index not in removed:
                        stream.advance(block.index, block.module, device)
                for stream in (dense, base):
                    if stream is dense or block.index not in removed:
                        stream.advance(block.index, block.module, device)
            on_block_done(block)
        head = LMHead(model, blocks, inputs.calls.layout)
        with head.on(device):
            reference = head(dense.hidden[0], windows).flatten(0, -2)
            return {
                index: float(kl_divergence(head(stream.hidden[0], windows).flatten(0, -2), reference, len(reference)))
                for index, stream in streams.items()
            }
