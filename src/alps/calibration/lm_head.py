"""Logits of a whole model for changed outputs of its blocks, and the divergence that a change of weights causes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_calls import BlockLayout, hidden_of
from alps.calibration.block_capture import capture_block_inputs, probe_layout, split_states
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.replaced_forward import replaced_forwards
from alps.core.kl_divergence import kl_divergence
from alps.models.blocks import Block, non_block_weights, on_device

# Makes a context within which some weights of a block have other values.
Change = Callable[[], AbstractContextManager[None]]


class LMHead:
    """Part of a model after its blocks, as a function of the last block's output.

    Attributes:
        model: the causal language model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], layout: BlockLayout | None = None) -> None:
        """Describe a model.

        Args:
            model: a causal language model.
            blocks: its decoder blocks.
            layout: of the blocks; None runs one window through the model to learn it.
        """
        self.model, self._blocks = model, blocks
        self._layout = layout

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Compute logits (windows, tokens, vocabulary).

        Args:
            hidden: outputs of the last block, (windows, ..., features).
            ids: token ids (windows, tokens).
        """
        layout = self._get_layout(ids)
        device = self._non_block_tensors()[0].device
        last_output = layout.to_model(hidden.to(device))

        def make_forward(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                is_last = index == len(self._blocks) - 1
                return layout.wrap(index, last_output if is_last else split_states(original, args, kwargs)[0])

            return forward

        with replaced_forwards(self._blocks, make_forward):
            logits: Tensor = self.model(input_ids=ids.to(device), use_cache=False).logits
        return logits

    def hidden_of(self, output: Any, ids: Tensor) -> Tensor:
        """Return the hidden states (windows, ..., features) in what the last block returned for token ids.

        Args:
            output: a tensor, or a tuple that begins with it.
            ids: token ids (windows, tokens).

        Raises:
            UnsupportedModel: when the blocks cannot be run one by one.
        """
        return self._get_layout(ids).from_model(hidden_of(output))

    def _get_layout(self, ids: Tensor) -> BlockLayout:
        if self._layout is None:
            self._layout = probe_layout(self.model, self._blocks, ids[:1])
        return self._layout

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
    dense, changed = inputs.copy(), list[BlockInputs]()
    with torch.no_grad():
        for block, block_changes in zip(blocks, changes, strict=True):
            with on_device(block, device):
                for states in changed:
                    states.advance(block.index, block.module, device)
                for change in block_changes:
                    with change():
                        changed.append(dense.copy())
                        changed[-1].advance(block.index, block.module, device)
                dense.advance(block.index, block.module, device)
            on_block_done(block)
        head = LMHead(model, blocks, inputs.calls.layout)
        with head.on(device):
            reference = head(dense.hidden[0], windows).flatten(0, -2)
            divergences = iter([_mean_divergence(head(states.hidden[0], windows), reference) for states in changed])
    return [[next(divergences) for _ in block_changes] for block_changes in changes]


def _mean_divergence(logits: Tensor, reference: Tensor) -> float:
    return float(kl_divergence(logits.flatten(0, -2), reference, len(reference)))
