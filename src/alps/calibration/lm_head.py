"""Ask the whole model what a change inside one block does to its answers, by replaying what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs, capture_block_inputs, replaced_forwards
from alps.core.kl_divergence import kl_divergence
from alps.models.blocks import Block, non_block_weights, on_device

Change = Callable[[], AbstractContextManager[None]]


class Head:
    """Everything of a model that comes after its blocks, as a function of the last block's output."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], bare: bool | None = None) -> None:
        self.model, self._blocks = model, blocks
        self._bare = bare  # whether a block returns its hidden states alone; None: one is asked

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) for the last block's output (batch, tokens, features)."""
        home = self._outside()[0].device
        answer = hidden.to(home)

        def stand_in(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._bare is None:
                    with torch.no_grad():
                        self._bare = torch.is_tensor(real(*args, **kwargs))
                passed = args[0] if args else kwargs["hidden_states"]
                states = answer if index == len(self._blocks) - 1 else passed
                return states if self._bare else (states,)

            return forward

        with replaced_forwards(self._blocks, stand_in):
            logits: Tensor = self.model(input_ids=ids.to(home), use_cache=False).logits
        return logits

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Bring all that lies outside the blocks to a device for the time of the body, which must not change it."""
        with non_block_weights(self._blocks):
            tensors = self._outside()
            homes = [tensor.data for tensor in tensors]
            try:
                for tensor in tensors:
                    tensor.data = tensor.data.to(device)
                yield
            finally:
                for tensor, data in zip(tensors, homes, strict=True):
                    tensor.data = data

    def _outside(self) -> list[Tensor]:
        """Parameters and buffers outside the blocks, each once."""
        inside = {id(t) for block in self._blocks for t in (*block.module.parameters(), *block.module.buffers())}
        return [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in inside]


def divergences(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    device: torch.device,
    changes: Sequence[Sequence[Change]],
    done: Callable[[Block], None] = lambda _: None,
) -> list[list[float]]:
    """What each of many changes, made alone, does to the model's answers.

    One sweep: every block comes to the device once. What a change leaves behind in its block's output is carried
    through the blocks after it, beside the unchanged states.

    Args:
        model: in evaluation mode; left as it was.
        blocks: its decoder blocks.
        windows: token ids (windows, tokens), run as one batch.
        device: where blocks and head run.
        changes: for every block, contexts within which some of its weights are other ones.
        done: told when a block has been run for the last time.

    Returns:
        For every change, mean KL(model || changed model) per token in nats.
    """
    inputs = capture_block_inputs(model, blocks, windows, len(windows))
    home = inputs.hidden[0].device
    dense, carried = inputs.hidden[0], list[Tensor]()

    def after(block: Block, hidden: Tensor) -> Tensor:
        return BlockInputs([hidden], inputs.arguments).run(block.index, block.module, 0, device).to(home)

    with torch.no_grad():
        for block, mine in zip(blocks, changes, strict=True):
            with on_device(block, device):
                carried = [after(block, hidden) for hidden in carried]
                for change in mine:
                    with change():
                        carried.append(after(block, dense))
                dense = after(block, dense)
            done(block)
        head = Head(model, blocks, inputs.returns_tensor)
        with head.on(device):
            reference = head(dense, windows).flatten(0, -2)
            found = iter([_divergence(head(hidden, windows), reference) for hidden in carried])
    return [[next(found) for _ in mine] for mine in changes]


def _divergence(logits: Tensor, reference: Tensor) -> float:
    return float(kl_divergence(logits.flatten(0, -2), reference, len(reference)))
