"""Logits of a whole model for changed outputs of its blocks, and the divergence that a change of weights causes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs, capture_block_inputs, replaced_forwards
from alps.core.kl_divergence import kl_divergence
from alps.models.blocks import Block, non_block_weights, on_device

# Makes a context within which some weights of a block have other values.
Change = Callable[[], AbstractContextManager[None]]


class LMHead:
    """Part of a model after its blocks, as a function of the last block's output.

    Attributes:
        model: the causal language model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], returns_tensor: bool | None = None) -> None:
        """Describe a model.

        Args:
            model: a causal language model.
            blocks: its decoder blocks.
            returns_tensor: blocks return their hidden states as a tensor, not first in a tuple; None runs a block to
                learn this.
        """
        self.model, self._blocks = model, blocks
        self._returns_tensor = returns_tensor

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Compute logits (batch, tokens, vocabulary).

        Args:
            hidden: outputs of the last block, (batch, tokens, features).
            ids: token ids (batch, tokens).
        """
        device = self._non_block_tensors()[0].device
        last_output = hidden.to(device)

        def make_forward(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._returns_tensor is None:
                    with torch.no_grad():
                        self._returns_tensor = torch.is_tensor(original(*args, **kwargs))
                block_input = args[0] if args else kwargs["hidden_states"]
                states = last_output if index == len(self._blocks) - 1 else block_input
                return states if self._returns_tensor else (states,)

            return forward

        with replaced_forwards(self._blocks, make_forward):
            logits: Tensor = self.model(input_ids=ids.to(device), use_cache=False).logits
        return logits

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Context in which all tensors outside the blocks are on a device; changes made inside it may be lost."""
        with non_block_weights(self._blocks):
            tensors = self._non_block_tensors()
            original_data = [tensor.data for tensor in tensors]
            try:
                for tensor in tensors:
                    tensor.data = tensor.data.to(device)
                yield
            finally:
                for tensor, data in zip(tensors, original_data, strict=True):
                    tensor.data = data

    def _non_block_tensors(self) -> list[Tensor]:
        """Return the parameters and buffers outside the blocks, each once."""
        block_tensors = {id(t) for block in self._blocks for t in (*block.module.parameters(), *block.module.buffers())}
        return [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in block_tensors]


def measure_divergences(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    changes: Sequence[Sequence[Change]],
    *,
    device: torch.device,
    on_block_done: Callable[[Block], None] = lambda _: None,
) -> list[list[float]]:
    """Measure the divergence of the model's predictions for each of many changes, one change at a time.

    Every block is moved to the device once. The changed outputs of earlier blocks run through it together with the
    unchanged hidden states.

    Args:
        model: in evaluation mode; left unchanged.
        blocks: its decoder blocks.
        windows: token ids (windows, tokens), run as one batch.
        changes: for every block, contexts within which some of its weights have other values.
        device: where blocks and LM head run.
        on_block_done: called after the last run of a block.

    Returns:
        For every change, mean KL(model || changed model) per token in nats.
    """
    inputs = capture_block_inputs(model, blocks, windows, len(windows))
    original_device = inputs.hidden[0].device
    dense_states, changed_states = inputs.hidden[0], list[Tensor]()

    def run_block(block: Block, hidden: Tensor) -> Tensor:
        output = BlockInputs([hidden], inputs.arguments).run(block.index, block.module, 0, device)
        return output.to(original_device)

    with torch.no_grad():
        for block, block_changes in zip(blocks, changes, strict=True):
            with on_device(block, device):
                changed_states = [run_block(block, hidden) for hidden in changed_states]
                for change in block_changes:
                    with change():
                        changed_states.append(run_block(block, dense_states))
                dense_states = run_block(block, dense_states)
            on_block_done(block)
        head = LMHead(model, blocks, inputs.returns_tensor)
        with head.on(device):
            reference = head(dense_states, windows).flatten(0, -2)
            divergences = iter([_mean_divergence(head(hidden, windows), reference) for hidden in changed_states])
    return [[next(divergences) for _ in block_changes] for block_changes in changes]


def _mean_divergence(logits: Tensor, reference: Tensor) -> float:
    return float(kl_divergence(logits.flatten(0, -2), reference, len(reference)))
