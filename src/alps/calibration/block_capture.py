"""Capture of the inputs of all blocks, by running the model with its blocks replaced by recorders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.argument_recorder import ArgumentRecorder, UnsupportedArgument
from alps.calibration.block_arguments import BlockArguments, to_meta
from alps.calibration.block_calls import BlockCalls, BlockLayout
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.replaced_forward import replaced_forwards
from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block, memory_device, non_block_weights, on_device


def capture_block_inputs(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    batch_size: int | list[int],
    *,
    activations: ActivationStore | None = None,
) -> BlockInputs:
    """Run the model over all windows with its blocks replaced by recorders.

    Only what precedes the blocks is computed (embeddings, masks, rotary tables). Before that, one window is run through
    the complete model, with a real call of the first block of every class, to learn how blocks are called and what they
    return. Arguments belong to a batch; those that are equal for all batches of a size are stored once.

    Args:
        model: a causal language model; it is called with `input_ids` and `use_cache=False`.
        blocks: its decoder blocks.
        windows: token ids, shape (windows, tokens).
        batch_size: windows per batch, or the sizes of all batches.
        activations: storage of the hidden states; None keeps their device.

    Raises:
        UnsupportedModel: unless a forward calls the blocks in order, once each, every block on exactly what the
            block before it returned.
    """
    activations = activations or ActivationStore()
    hidden = list[Tensor]()
    arguments: list[list[BlockArguments]] = [[] for _ in blocks]
    with torch.no_grad(), non_block_weights(blocks):
        layout, single = _probe(model, blocks, windows[:1])
        references = {1: single}
        for batch in torch.split(windows, batch_size):
            earlier = (single, references[len(batch)]) if len(batch) in references else (single,)
            forward = _Forward(model, blocks, ArgumentRecorder(len(batch), earlier, activations.store))
            forward.run(batch, layout)
            references.setdefault(len(batch), forward.arguments)
            hidden.append(activations.store(layout.from_model(forward.hidden)))
            for of_block, recorded in zip(arguments, forward.arguments, strict=True):
                of_block.append(recorded)
    shapes = [to_meta(of_block) for of_block in single]
    return BlockInputs(hidden, BlockCalls(layout, arguments, shapes), windows.shape[1], activations=activations)


def probe_layout(model: nn.Module, blocks: Sequence[Block], window: Tensor) -> BlockLayout:
    """Run one window of token ids (1, tokens) through a model to learn how its blocks are called.

    Raises:
        UnsupportedModel: see `capture_block_inputs`.
    """
    with torch.no_grad(), non_block_weights(blocks):
        return _probe(model, blocks, window)[0]


def _probe(model: nn.Module, blocks: Sequence[Block], window: Tensor) -> tuple[BlockLayout, list[BlockArguments]]:
    """Return the layout of the blocks, and their arguments for one window."""
    forward = _Forward(model, blocks, ArgumentRecorder(1))
    forward.run(window)
    extra_outputs = tuple(forward.extra_outputs[type(block.module)] for block in blocks)
    axis = next((axis for axis, size in enumerate(forward.hidden.shape) if size == 1), None)
    if axis is None:
        raise forward.unsupported("their hidden states have no axis of windows")
    return BlockLayout(extra_outputs, axis), forward.arguments


class _BlocksDone(Exception):
    """End of a forward at the last block: the output head, above all, is not computed."""


class _Forward:
    """Forward of a model whose blocks record their arguments and pass the hidden states on.

    Attributes:
        arguments: of the blocks that were called, in order.
        hidden: the hidden states of the first of them, in the model's layout.
        extra_outputs: number of outputs after the hidden states by class of block, None for a tensor alone.
    """

    hidden: Tensor

    def __init__(self, model: nn.Module, blocks: Sequence[Block], recorder: ArgumentRecorder) -> None:
        self.arguments: list[BlockArguments] = []
        self.extra_outputs: dict[type, int | None] = {}
        self._model, self._blocks, self._recorder = model, blocks, recorder
        self._layout: BlockLayout | None = None
        self._passed_on: Tensor | None = None

    def run(self, windows: Tensor, layout: BlockLayout | None = None) -> None:
        """Run the model on token ids (windows, tokens).

        Args:
            windows: token ids.
            layout: of the blocks. Without it, the first block of every class is really called, and the forward is run
                to its end: it shows if a block is called after the last one.

        Raises:
            UnsupportedModel: see `capture_block_inputs`.
        """
        self._layout = layout
        device = memory_device(self._model)
        with replaced_forwards(self._blocks, self._make_forward), suppress(_BlocksDone):
            self._model(input_ids=windows.to(device), use_cache=False)
        if len(self.arguments) != len(self._blocks):
            raise self.unsupported(f"block {len(self.arguments)} is not called")
        if layout is not None and self.hidden.shape[layout.window_axis] != len(windows):
            raise self.unsupported(f"axis {layout.window_axis} of their hidden states is not that of the windows")

    def unsupported(self, reason: str) -> UnsupportedModel:
        """Return the error for a model whose blocks cannot be run one by one."""
        return unsupported(self._model, reason)

    def _make_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the replacement for the forward of block `index`."""
        block = self._blocks[index]

        def record(*args: Any, **kwargs: Any) -> Any:
            states, other_args, other_kwargs = split_states(original, args, kwargs)
            self._check_order(index, states)
            if not self.arguments:
                self.hidden = states.detach()
            names = argument_names(original, len(other_args))
            try:
                self.arguments.append(self._recorder.record(index, names, BlockArguments(other_args, other_kwargs)))
            except UnsupportedArgument as error:
                subject = f"block {index}" if not error.name else f"argument {error.name} of block {index}"
                raise self.unsupported(f"{subject}: {error.reason}") from None
            return self._outputs(block, states, lambda: original(*args, **kwargs))

        return record

    def _check_order(self, index: int, states: Tensor) -> None:
        if index < len(self.arguments):
            raise self.unsupported(f"block {index} is called more than once")
        if index > len(self.arguments):
            raise self.unsupported(f"block {index} is called in place of block {len(self.arguments)}")
        if index > 0 and not _is_equal(states, self._passed_on):
            raise self.unsupported(f"block {index} does not receive what block {index - 1} returned")

    def _outputs(self, block: Block, states: Tensor, call: Callable[[], Any]) -> Any:
        """Return what a block returns: its hidden states, and placeholders for later ones to receive."""
        # A tensor object of its own shows which block's output an argument is.
        self._passed_on = states.view_as(states)
        if self._layout is None:
            kind = type(block.module)
            if kind not in self.extra_outputs:
                with _loaded(block):
                    output = call()
                if type(output) not in (tuple, list) and not torch.is_tensor(output):
                    raise self.unsupported(f"block {block.index} returns a {type(output).__name__}")
                self.extra_outputs[kind] = None if torch.is_tensor(output) else len(output) - 1
            count = self.extra_outputs[kind]
        else:
            count = self._layout.extra_outputs[block.index]
        # Their values are never read, unless the model computes with them between its blocks, which is not supported.
        extra = [torch.zeros_like(states) for _ in range(count or 0)]
        self._recorder.hand_on(block.index, [self._passed_on, *extra])
        if self._layout is not None and len(self.arguments) == len(self._blocks):
            raise _BlocksDone
        return self._passed_on if count is None else (self._passed_on, *extra)


def unsupported(model: nn.Module, reason: str) -> UnsupportedModel:
    """Return the error for a model whose blocks cannot be run one by one."""
    return UnsupportedModel(f"The blocks of {type(model).__name__} cannot be run one by one: {reason}.")


def _loaded(block: Block) -> AbstractContextManager[None]:
    """Context in which the weights of a block are in memory."""
    return nullcontext() if block.store is None else on_device(block, torch.device("cpu"))


def _is_equal(states: Tensor, passed_on: Tensor | None) -> bool:
    return states is passed_on or (
        passed_on is not None and states.shape == passed_on.shape and torch.equal(states, passed_on)
    )


def split_states(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a block into its hidden states, and the other positional and keyword arguments.

    The hidden states are the argument `hidden_states`, or the first one.
    """
    name = "hidden_states" if "hidden_states" in kwargs else None
    if name is None and args:
        return args[0], args[1:], kwargs
    name = name or next(iter(inspect.signature(forward).parameters))
    return kwargs[name], args, {key: value for key, value in kwargs.items() if key != name}


def argument_names(forward: Callable[..., Any], count: int) -> list[str]:
    """Return the names of the first `count` positional arguments of a block after its hidden states."""
    names = [name for name, p in inspect.signature(forward).parameters.items() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [names[i] if i < len(names) else f"number {i}" for i in range(1, count + 1)]
