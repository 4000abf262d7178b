"""The skeleton pass: what every block receives when the model itself is called, and replaying a block with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import Activations
from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block, non_block_weights, on_device


@dataclass(frozen=True)
class Call:
    """The arguments of one block but for its hidden states: masks, position embeddings, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call `block` on `hidden` (batch, tokens, features); returns its hidden states, moved with the arguments."""
        args, kwargs = to_device(self.args, hidden.device), to_device(self.kwargs, hidden.device)
        return hidden_of(block(hidden, *args, **kwargs))


# Tokens of a batch: on a CPU what its caches hold, which is as fast alone and faster beside another process
# (docs/performance.md); on a GPU many, and where every expert receives a few of them.
_FEW, _MANY = 512, 4096

# The class of a block, and the names of its sites inside it.
Structure = tuple[type, tuple[str, ...]]


@dataclass
class BlockInputs:
    """What the blocks receive for a set of equally long windows.

    Attributes:
        hidden: one tensor (batch, tokens, features) for every batch: the inputs of the next block to be run.
        calls: for every block, by batch size, the other arguments; those for a single window are always there.
        bare: whether blocks return their hidden states alone, not first in a tuple.
        activations: where the hidden states are kept.
        called_once: structures of blocks that were seen to call each of their sites once, and no other.
    """

    hidden: list[Tensor]
    calls: list[dict[int, Call]]
    bare: bool = True
    activations: Activations = field(default_factory=Activations)
    called_once: set[Structure] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)

    def beside(self) -> BlockInputs:
        """The same inputs for another walk over the blocks."""
        return replace(self, hidden=list(self.hidden))

    def run(self, index: int, block: nn.Module, batch: int, device: torch.device, window: int | None = None) -> Tensor:
        """Outputs of block `index` for batch number `batch`, or for one window of it, on `device`."""
        hidden = self.hidden[batch] if window is None else self.hidden[batch][window : window + 1]
        hidden = hidden.to(device)
        return self.calls[index][hidden.shape[0]].run(block, hidden)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Turn the inputs of block `index` into those of the next, batch by batch."""
        with torch.no_grad():
            for batch in range(len(self.hidden)):
                self.put(batch, self.run(index, block, batch, device))

    def put(self, batch: int, states: Tensor) -> None:
        """Keep the hidden states of a batch, in place of those before."""
        home = self.hidden[batch].device
        del self.hidden[batch]  # first: what is let go makes room
        self.hidden.insert(
            batch, self.activations.place(states.to(home) if self.activations.device is None else states)
        )


def batch_tokens(blocks: Sequence[Block], device: torch.device) -> int:
    """How many calibration tokens a forward of a block is to take."""
    experts = any(site.expert is not None for block in blocks for site in block.sites)
    return _FEW if device.type == "cpu" and not experts else _MANY


def capture_block_inputs(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    batch_size: int | list[int],
    activations: Activations | None = None,
) -> BlockInputs:
    """Run the model over all windows with its blocks replaced by recorders.

    Only what comes before the blocks is computed (embeddings, masks, rotary tables). Before that, one window is run
    with what follows them and one real call of the first block, to learn how blocks are called and what they return.

    Args:
        model: a causal language model; it is called with `input_ids` and `use_cache=False`.
        blocks: its decoder blocks.
        windows: token ids, shape (windows, tokens).
        batch_size: windows per batch, or of every batch.
        activations: where the hidden states are kept; None leaves them where they come about.

    Raises:
        UnsupportedModel: unless a forward pass calls the blocks in order, once each, every one on exactly what the
            one before it returned.
    """
    activations = activations or Activations()
    recorder = _Recorder(type(model).__name__, blocks, activations)
    with torch.no_grad(), non_block_weights(blocks), _ready(blocks[0]), replaced_forwards(blocks, recorder.forward):
        device = next(model.parameters()).device
        for batch in (windows[:1], *torch.split(windows, batch_size)):
            recorder.begin()
            with suppress(_BlocksDone):
                model(input_ids=batch.to(device), use_cache=False)
            recorder.end()
    return BlockInputs(recorder.hidden, recorder.calls, recorder.bare, activations)


def _ready(block: Block) -> AbstractContextManager[None]:
    """The block's weights in memory; where they are, when they are."""
    return nullcontext() if block.store is None else on_device(block, torch.device("cpu"))


class _BlocksDone(Exception):
    """The last block has been reached: what follows it, the output head above all, is not wanted."""


class _Recorder:
    """Stands in for the forwards of all blocks: notes what each is handed and passes the hidden states on."""

    def __init__(self, model_name: str, blocks: Sequence[Block], activations: Activations) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[dict[int, Call]] = [{} for _ in blocks]
        self._model_name, self._activations = model_name, activations
        self._expected = 0
        self._whole = False  # one forward has been seen from end to end
        self._passed_on: Tensor | None = None
        self._rest: tuple[Any, ...] | None = None  # what a block returns after its hidden states; None if bare

    @property
    def bare(self) -> bool:
        """Whether blocks return their hidden states alone."""
        return self._rest is None

    def begin(self) -> None:
        """A forward of the model starts."""
        self._expected, self._passed_on = 0, None

    def end(self) -> None:
        """A forward of the model is over. The first one, of which nothing is kept, shows whether anything calls a block
        after the last.
        """
        if self._expected != len(self.calls):
            raise self._unwalkable(f"block {self._expected} is not called")
        self._whole = True

    def forward(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of block `index`; `real` is what it replaces."""

        def record(*args: Any, **kwargs: Any) -> Any:
            states, rest = _split(args, kwargs)
            if index != self._expected:
                raise self._unwalkable(f"block {index} is called where block {self._expected} was expected")
            if index > 0 and not _same(states, self._passed_on):
                raise self._unwalkable(f"block {index} is not handed what block {index - 1} returned")
            if index == 0:
                if self._whole:
                    self.hidden.append(self._activations.place(states.detach()))
                else:
                    output = real(*args, **kwargs)
                    self._rest = None if torch.is_tensor(output) else tuple(output[1:])
            self.calls[index][states.shape[0]] = Call(rest, kwargs_without_states(kwargs))
            self._expected, self._passed_on = index + 1, states
            if self._expected == len(self.calls) and self._whole:
                raise _BlocksDone
            return states if self._rest is None else (states, *self._rest)

        return record

    def _unwalkable(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"The layers of {self._model_name} cannot be walked one by one: {reason}.")


def _same(states: Tensor, passed_on: Tensor | None) -> bool:
    return states is passed_on or (
        passed_on is not None and states.shape == passed_on.shape and torch.equal(states, passed_on)
    )


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
def replaced_forwards(
    blocks: Sequence[Block], recorder: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give every block's instance another `forward` for the time of the body; its class stays untouched."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.module, recorder(block.index, block.module.forward)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The same for one module, of any kind."""
    # Something else (accelerate's hooks, say) may have put a forward on the instance: it is put back.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
