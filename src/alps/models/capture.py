"""The skeleton pass: what every block receives when the model itself is called, and replaying a block with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alps.errors import UnsupportedModel
from alps.models.blocks import Block


@dataclass(frozen=True)
class Call:
    """The arguments of one block but for its hidden states: masks, position embeddings, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call `block` on `hidden` (batch, tokens, features); returns its hidden states, moved with the arguments."""
        args, kwargs = to_device(self.args, hidden.device), to_device(self.kwargs, hidden.device)
        return hidden_of(block(hidden, *args, **kwargs))


@dataclass
class BlockInputs:
    """What the blocks receive for a set of equally long windows.

    Attributes:
        hidden: one tensor (batch, tokens, features) for every batch: the inputs of the next block to be run.
        calls: for every block, by batch size, the other arguments.
    """

    hidden: list[Tensor]
    calls: list[dict[int, Call]]

    def run(self, index: int, block: nn.Module, batch: int, device: torch.device) -> Tensor:
        """Outputs of block `index` for batch number `batch`, on `device`."""
        hidden = self.hidden[batch].to(device)
        return self.calls[index][hidden.shape[0]].run(block, hidden)


def capture(model: nn.Module, blocks: Sequence[Block], windows: Tensor, batch_size: int) -> BlockInputs:
    """Run the model over all windows with its blocks replaced by recorders.

    Only what surrounds the blocks is computed (embeddings, masks, rotary tables), and one real call of the
    first block, to learn whether blocks return a tensor or a tuple.

    Args:
        model: a causal language model; it is called with `input_ids` and `use_cache=False`.
        blocks: its decoder blocks.
        windows: token ids, shape (windows, tokens).
        batch_size: windows per batch.

    Raises:
        UnsupportedModel: when a block is not called exactly once in a forward pass.
    """
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]
    first_output: list[Any] = []

    def recorder(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            states, rest = _split(args, kwargs)
            if index == 0:
                if not first_output:
                    first_output.append(real(*args, **kwargs))
                hidden.append(states.detach())
            calls[index][states.shape[0]] = Call(rest, kwargs_without_states(kwargs))
            return states if torch.is_tensor(first_output[0]) else (states, *first_output[0][1:])

        return record

    with torch.no_grad(), _replaced_forwards(blocks, recorder):
        for batch in torch.split(windows, batch_size):
            model(input_ids=batch.to(device), use_cache=False)
    batches = -(-len(windows) // batch_size)
    if len(hidden) != batches or any(not call for call in calls):
        raise UnsupportedModel(
            f"The blocks of {type(model).__name__} are not each called once in a forward pass: "
            "its layers cannot be walked one by one."
        )
    return BlockInputs(hidden, calls)


def hidden_of(output: Any) -> Tensor:
    """The hidden states of a block's output: transformers 5 returns them bare, older code first in a tuple."""
    states = output if torch.is_tensor(output) else output[0]
    assert torch.is_tensor(states)
    return states


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside tuples, lists and dicts moved to `device`."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def kwargs_without_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a block but for the hidden states."""
    return {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], args
    return args[0], args[1:]


@contextmanager
def _replaced_forwards(
    blocks: Sequence[Block], recorder: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give every block's instance another `forward` for the time of the body; its class stays untouched."""
    try:
        for block in blocks:
            block.module.__dict__["forward"] = recorder(block.index, block.module.forward)
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
