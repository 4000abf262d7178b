"""Capture of the inputs of all blocks in one forward of the model, and replay of single blocks with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block, non_block_weights, on_device


@dataclass(frozen=True)
class BlockArguments:
    """Arguments of one block except its hidden states: masks, position embeddings, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block with these arguments.

        Args:
            block: on the device of `hidden`.
            hidden: (batch, tokens, features).

        Returns:
            Hidden states of the same shape.
        """
        args, kwargs = to_device(self.args, hidden.device), to_device(self.kwargs, hidden.device)
        return hidden_of(block(hidden, *args, **kwargs))


# Tokens of a batch. On a CPU they fit into its caches, which is as fast for one process and faster for two
# (docs/performance.md). On a GPU, and for experts, of which each receives only a part, there are many.
_CPU_BATCH_TOKENS, _BATCH_TOKENS = 512, 4096

# Class of a block, and the names of its sites inside it.
Structure = tuple[type, tuple[str, ...]]


@dataclass
class BlockInputs:
    """Inputs of the blocks for a set of windows of equal length.

    Attributes:
        hidden: one tensor (batch, tokens, features) per batch, the inputs of the next block to run.
        arguments: the other arguments, for every block by batch size; those for a single window are always there.
        returns_tensor: blocks return their hidden states as a tensor, not first in a tuple.
        activations: storage of the hidden states.
        called_once: structures of blocks that called each of their sites exactly once in a forward.
    """

    hidden: list[Tensor]
    arguments: list[dict[int, BlockArguments]]
    returns_tensor: bool = True
    activations: ActivationStore = field(default_factory=ActivationStore)
    called_once: set[Structure] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)

    def copy(self) -> BlockInputs:
        """Return the same inputs for another pass over the blocks; tensors are shared."""
        return replace(self, hidden=list(self.hidden))

    def run(
        self, index: int, block: nn.Module, batch: int, device: torch.device, *, window: int | None = None
    ) -> Tensor:
        """Run block `index` on a batch, or on one window of it.

        Args:
            index: of the block.
            block: on `device`.
            batch: number of the batch.
            device: where to run.
            window: number of the window in the batch; None for all.

        Returns:
            Outputs of the block, (batch, tokens, features).
        """
        hidden = self.hidden[batch] if window is None else self.hidden[batch][window : window + 1]
        hidden = hidden.to(device)
        return self.arguments[index][hidden.shape[0]].run(block, hidden)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Replace the inputs of block `index` by its outputs, batch by batch."""
        with torch.no_grad():
            for batch in range(len(self.hidden)):
                self.replace_batch(batch, self.run(index, block, batch, device))

    def replace_batch(self, batch: int, states: Tensor) -> None:
        """Store the hidden states of a batch in place of the previous ones."""
        original_device = self.hidden[batch].device
        del self.hidden[batch]  # freed first, to make room
        stored = self.activations.store(states.to(original_device) if self.activations.device is None else states)
        self.hidden.insert(batch, stored)


def batch_tokens(blocks: Sequence[Block], device: torch.device) -> int:
    """Return the number of calibration tokens for a forward of a block."""
    has_experts = any(site.expert is not None for block in blocks for site in block.sites)
    return _CPU_BATCH_TOKENS if device.type == "cpu" and not has_experts else _BATCH_TOKENS


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
    the complete model, with a real call of the first block, to learn how blocks are called and what they return.

    Args:
        model: a causal language model; it is called with `input_ids` and `use_cache=False`.
        blocks: its decoder blocks.
        windows: token ids, shape (windows, tokens).
        batch_size: windows per batch, or the sizes of all batches.
        activations: storage of the hidden states; None keeps their device.

    Raises:
        UnsupportedModel: unless a forward calls the blocks in order, once each, every block on exactly what the block
            before it returned.
    """
    activations = activations or ActivationStore()
    recorder = _Recorder(type(model).__name__, blocks, activations)
    with (
        torch.no_grad(),
        non_block_weights(blocks),
        _loaded(blocks[0]),
        replaced_forwards(blocks, recorder.make_forward),
    ):
        device = next(model.parameters()).device
        for batch in (windows[:1], *torch.split(windows, batch_size)):
            recorder.begin()
            with suppress(_BlocksDone):
                model(input_ids=batch.to(device), use_cache=False)
            recorder.end()
    return BlockInputs(recorder.hidden, recorder.arguments, recorder.returns_tensor, activations)


def _loaded(block: Block) -> AbstractContextManager[None]:
    """Context in which the weights of a block are in memory."""
    return nullcontext() if block.store is None else on_device(block, torch.device("cpu"))


class _BlocksDone(Exception):
    """End of a forward at the last block: the output head, above all, is not computed."""


class _Recorder:
    """Replacement of the forwards of all blocks, which records their arguments and passes the hidden states on."""

    def __init__(self, model_name: str, blocks: Sequence[Block], activations: ActivationStore) -> None:
        self.hidden: list[Tensor] = []
        self.arguments: list[dict[int, BlockArguments]] = [{} for _ in blocks]
        self._model_name, self._activations = model_name, activations
        self._next_block = 0
        self._is_probed = False  # one complete forward is done
        self._passed_on: Tensor | None = None
        self._extra_outputs: tuple[Any, ...] | None = None  # those after the hidden states; None for a tensor alone

    @property
    def returns_tensor(self) -> bool:
        """True if blocks return their hidden states as a tensor, not first in a tuple."""
        return self._extra_outputs is None

    def begin(self) -> None:
        """Begin a forward of the model."""
        self._next_block, self._passed_on = 0, None

    def end(self) -> None:
        """End a forward of the model.

        The first forward, whose hidden states are not stored, runs to its end. It shows if a block is called after the
        last one.
        """
        if self._next_block != len(self.arguments):
            raise self._unsupported(f"block {self._next_block} is not called")
        self._is_probed = True

    def make_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the replacement for the forward of block `index`."""

        def record(*args: Any, **kwargs: Any) -> Any:
            states, other_args = _split(args, kwargs)
            if index != self._next_block:
                raise self._unsupported(f"block {index} is called in place of block {self._next_block}")
            if index > 0 and not _is_equal(states, self._passed_on):
                raise self._unsupported(f"block {index} does not receive what block {index - 1} returned")
            if index == 0:
                if self._is_probed:
                    self.hidden.append(self._activations.store(states.detach()))
                else:
                    output = original(*args, **kwargs)
                    self._extra_outputs = None if torch.is_tensor(output) else tuple(output[1:])
            self.arguments[index][states.shape[0]] = BlockArguments(other_args, kwargs_without_states(kwargs))
            self._next_block, self._passed_on = index + 1, states
            if self._next_block == len(self.arguments) and self._is_probed:
                raise _BlocksDone
            return states if self._extra_outputs is None else (states, *self._extra_outputs)

        return record

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"The blocks of {self._model_name} cannot be run one by one: {reason}.")


def _is_equal(states: Tensor, passed_on: Tensor | None) -> bool:
    return states is passed_on or (
        passed_on is not None and states.shape == passed_on.shape and torch.equal(states, passed_on)
    )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output: transformers 5 returns a tensor, older code a tuple."""
    states = output if torch.is_tensor(output) else output[0]
    assert torch.is_tensor(states)
    return states


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor inside tuples, lists and dicts to a device."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def kwargs_without_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a block except the hidden states."""
    return {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """Split the arguments of a block into its hidden states and the other positional ones."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], args
    return args[0], args[1:]


@contextmanager
def replaced_forwards(
    blocks: Sequence[Block], make_forward: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Context in which the instance of every block has another `forward`; the class stays unchanged.

    Args:
        blocks: whose forwards to replace.
        make_forward: makes the replacement of a block's index and its forward.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.module, make_forward(block.index, block.module.forward)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which the instance of a module has another `forward`; the class stays unchanged."""
    # Other code, such as accelerate's hooks, may have set a forward on the instance, which is restored.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
