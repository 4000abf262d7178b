"""Calls of the blocks of a model: their arguments for every batch, and how they take and return hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_arguments import (
    BlockArguments,
    Call,
    Container,
    ContainerKey,
    HandedOn,
    HandedValues,
    leaves,
    make_call,
    select_window,
)


@dataclass(frozen=True)
class BlockLayout:
    """Form of what the blocks of a model take and return.

    Attributes:
        extra_outputs: for every block, the number of outputs after the hidden states; None if it returns its hidden
            states as a tensor.
        window_axis: axis of the windows in the hidden states, 0 in nearly all models.
    """

    extra_outputs: tuple[int | None, ...]
    window_axis: int = 0

    def wrap(self, index: int, states: Tensor, extra_outputs: Sequence[Any] | None = None) -> Any:
        """Return what block `index` returns with these hidden states, in the model's layout.

        Args:
            index: of the block.
            states: hidden states in the model's layout.
            extra_outputs: the outputs after them; None for placeholders.
        """
        count = self.extra_outputs[index]
        return states if count is None else (states, *(extra_outputs or [None] * count))

    def from_model(self, states: Tensor) -> Tensor:
        """Return hidden states with the windows in axis 0."""
        return states if self.window_axis == 0 else states.movedim(self.window_axis, 0)

    def to_model(self, states: Tensor) -> Tensor:
        """Return hidden states, with the windows in axis 0, in the model's layout."""
        return states if self.window_axis == 0 else states.movedim(0, self.window_axis)


@dataclass(frozen=True)
class BlockOutput:
    """Result of a block for a batch.

    Attributes:
        hidden: hidden states, (windows, ..., features).
        handed_on: values for later blocks, of this block and of earlier ones.
    """

    hidden: Tensor
    handed_on: HandedValues


@dataclass(frozen=True, eq=False)
class BlockCalls:
    """Calls of all blocks, as captured.

    Attributes:
        layout: of the blocks.
        arguments: for every block and batch. Batches with equal arguments share one object.
        single: for every block, the arguments for a single window, with the shapes of the tensors only.
    """

    layout: BlockLayout
    arguments: Sequence[Sequence[BlockArguments]]
    single: Sequence[BlockArguments]

    @cached_property
    def last_use(self) -> Mapping[HandedOn | ContainerKey, int]:
        """Index of the last block that receives a value of earlier blocks."""
        last_use: dict[HandedOn | ContainerKey, int] = {}
        for index, arguments in enumerate(self.single):
            for leaf in leaves(arguments):
                if isinstance(leaf, HandedOn):
                    last_use[leaf] = index
                elif isinstance(leaf, Container):
                    last_use[leaf.key] = index
        return last_use

    def run(
        self,
        index: int,
        module: nn.Module,
        hidden: Tensor,
        handed_on: HandedValues,
        *,
        batch: int,
        window: int | None = None,
    ) -> BlockOutput:
        """Run a block.

        Args:
            index: of the block.
            module: the block, on the device of `hidden`.
            hidden: (windows, ..., features) of a batch, or of one window of it.
            handed_on: by earlier blocks, for the same windows.
            batch: number of the batch.
            window: number of the window in the batch; None for all.
        """
        call = self.make_call(index, handed_on, batch=batch, window=window, device=hidden.device)
        output = module(self.layout.to_model(hidden), *call.args, **call.kwargs)
        outputs = (output,) if torch.is_tensor(output) else tuple(output)
        values = dict[HandedOn | ContainerKey, Any](handed_on)
        values.update({HandedOn(index, position): value for position, value in enumerate(outputs)})
        values.update(call.changed_containers().items())
        return BlockOutput(self.layout.from_model(outputs[0]), self._still_used(index, values))

    def make_call(
        self, index: int, handed_on: HandedValues, *, batch: int, window: int | None, device: torch.device
    ) -> Call:
        """Return the arguments of a block for a batch or one of its windows, with tensors on a device; see `run`."""
        arguments = self.arguments[index][batch]
        if window is not None:
            arguments = select_window(arguments, self.single[index], window)
        return make_call(arguments, handed_on, device)

    def _still_used(self, index: int, handed_on: HandedValues) -> HandedValues:
        return {key: value for key, value in handed_on.items() if self.last_use.get(key, -1) > index}


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output: a tensor, or the first item of a tuple."""
    states = output if torch.is_tensor(output) else output[0]
    assert torch.is_tensor(states)
    return states


NO_CALLS = BlockCalls(BlockLayout(()), (), ())
