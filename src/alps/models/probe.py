"""Ask the whole model what a change inside one block does to its answers, by replaying what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alps.divergence import kl_divergence
from alps.models.blocks import Block
from alps.models.capture import BlockInputs, capture, replaced_forwards


class Head:
    """Everything of a model that comes after its blocks, as a function of the last block's output."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.model, self._blocks = model, blocks
        self._bare: bool | None = None  # whether a block returns its hidden states alone

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) for the last block's output (batch, tokens, features)."""
        home = next(self.model.parameters()).device
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


class Probe:
    """The dense model's states on a few windows, against which changed blocks are measured.

    Attributes:
        states: inputs of every block, and after them the output of the last, (windows, tokens, features) each.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], windows: Tensor) -> None:
        """Run the model once over `windows` (windows, tokens), all in one batch."""
        self._blocks, self._ids = blocks, windows
        self._head = Head(model, blocks)
        inputs = capture(model, blocks, windows, len(windows))
        self._calls = inputs.calls
        self.states = [inputs.hidden[0]]
        with torch.no_grad():
            for block in blocks:
                self.states.append(self._run(block, self.states[-1]))
            self._reference = self._logits(self.states[-1])

    def divergence(self, first: int) -> float:
        """Mean KL(model as it was || model as it is now) per token in nats, with blocks before `first` unchanged."""
        with torch.no_grad():
            hidden = self.states[first]
            for block in self._blocks[first:]:
                hidden = self._run(block, hidden)
            now = self._logits(hidden)
            return float(kl_divergence(now, self._reference, len(now)))

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        return BlockInputs([hidden], self._calls).run(block.index, block.module, 0, hidden.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, self._ids).flatten(0, -2)
