"""Inputs of the first block on the calibration windows, with which a run over the blocks begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs, batch_tokens
from alps.calibration.lm_head import LMHead
from alps.calibration.replay_check import check_replay
from alps.finetuning.block_reconstruction import OutputLoss
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block
from alps.pruning.environment import RunEnvironment


@dataclass(frozen=True)
class DensePrefix:
    """First calibration windows, for which a run computes the dense model's activations as well.

    Attributes:
        batches: of these windows, on every rank; None for all.
        share: of all tokens.
    """

    batches: int | None = None
    share: float = 1.0

    @classmethod
    def of(cls, count: int, tokens: int, reconstruction: ReconstructionParameters | None, ranks: int) -> DensePrefix:
        """Choose the windows: all, or as many as a block reconstruction trains on.

        Args:
            count: calibration windows of all ranks.
            tokens: of a window.
            reconstruction: parameters, whose steps the batches are; None without one.
            ranks: number of processes.
        """
        if reconstruction is None or reconstruction.max_distinct_tokens is None:
            return cls()
        rows = reconstruction.windows_per_step(tokens, ranks)
        # At least two batches, since one is held back.
        batches = max(reconstruction.max_distinct_tokens // (rows * tokens), 2)
        return cls(batches, min(batches * rows / count, 1.0))


def capture_first_inputs(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    environment: RunEnvironment,
    reconstruction: ReconstructionParameters | None,
) -> tuple[BlockInputs, OutputLoss]:
    """Record the inputs of the first block for the windows of this rank.

    Args:
        model: that the blocks belong to, in evaluation mode.
        blocks: all of its blocks in order.
        windows: calibration token ids (windows, tokens) of all ranks.
        environment: device, ranks and limits.
        reconstruction: parameters of a block reconstruction, whose steps the batches then are; None without one.

    Returns:
        The inputs, and the loss of the model's predictions on the same batches.

    Raises:
        UnsupportedModel: when blocks that run one by one do not give what the model gives.
    """
    tokens = windows.shape[1]
    batch_size: int | list[int] = max(batch_tokens(blocks, environment.device) // tokens, 1)
    if reconstruction is not None:
        rows = reconstruction.windows_per_step(tokens, environment.group.size)
        batch_size = environment.group.shard_batch_sizes(len(windows), rows)
    windows = environment.group.shard(windows)
    inputs = capture_block_inputs(model, blocks, windows, batch_size, activations=environment.activation_store())
    check_replay(model, blocks, inputs, windows, environment.device)
    batches = torch.split(windows, [len(hidden) for hidden in inputs.hidden])
    return inputs, OutputLoss(LMHead(model, blocks, inputs.calls.layout), batches)
