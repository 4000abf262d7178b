"""Check of captured block inputs: replaying the blocks must give what the model's own forward gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_arguments import children, leaves
from alps.calibration.block_calls import hidden_of
from alps.calibration.block_capture import argument_names, split_states, unsupported
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.lm_head import LMHead
from alps.calibration.replaced_forward import replaced_forwards
from alps.models.blocks import Block, on_device

# Tokens differ if their relative distance is above this number, and above as many roundings of the coarsest dtype.
_TOLERANCE, _ROUNDINGS = 1e-4, 8
# Share of the tokens that may differ: rounding can send a token to another expert.
_DIFFERING_TOKENS = 0.02
# Features of the hidden states that are compared.
_FEATURES = 64


def check_replay(
    model: nn.Module, blocks: Sequence[Block], inputs: BlockInputs, windows: Tensor, device: torch.device
) -> None:
    """Compare the replay of a batch with the model's own forward, block by block.

    It is the batch in the middle; of two batches both are compared. The replay comes first, when the last forward of
    the model was that of the last batch. So a block that reads something else than its arguments is noticed.

    Args:
        model: a causal language model.
        blocks: its decoder blocks, dense.
        inputs: of the first block, as captured.
        windows: token ids (windows, tokens) that they were captured from.
        device: where the blocks run.

    Raises:
        UnsupportedModel: when a block gives other hidden states; the message names the block and the argument.
    """
    batches = torch.split(windows, [len(hidden) for hidden in inputs.hidden])
    with torch.no_grad():
        for batch in range(len(batches)) if len(batches) == 2 else [(len(batches) - 1) // 2]:
            _Check(model, blocks, inputs, batch, device).run(batches[batch])


class _Compared(Exception):
    """End of a forward at the last block."""


class _Check:
    """Check of one batch."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], inputs: BlockInputs, batch: int, device: torch.device
    ) -> None:
        self._model, self._blocks, self._device = model, blocks, device
        calls = replace(inputs.calls, arguments=[of_block[batch : batch + 1] for of_block in inputs.calls.arguments])
        self._inputs = replace(
            inputs,
            hidden=inputs.hidden[batch : batch + 1],
            handed_on=[{}],
            single_handed_on={},
            calls=calls,
            activations=ActivationStore(),
        )
        self._layout = calls.layout
        dtypes = {tensor.dtype for tensor in (*model.parameters(), *inputs.hidden) if tensor.is_floating_point()}
        self._tolerance = max(_TOLERANCE, *(_ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes))
        # Some features of every block's replayed outputs, by block.
        self._replayed: dict[int, Tensor] = {}

    def run(self, ids: Tensor) -> None:
        """Replay all blocks, then run the model on token ids (windows, tokens) as far as its last block."""
        inputs = self._inputs.copy()
        for block in self._blocks:
            with on_device(block, self._device):
                self._replay(block, inputs)
            self._replayed[block.index] = _sample(inputs.hidden[0])
        head = LMHead(self._model, self._blocks, self._layout)
        with (
            head.on(self._device),
            replaced_forwards(self._blocks, self._make_forward),
            suppress(_Compared),
        ):
            self._model(input_ids=ids.to(self._device), use_cache=False)

    def _replay(self, block: Block, inputs: BlockInputs) -> None:
        """Advance the inputs by a block.

        Raises:
            UnsupportedModel: when the block writes into an argument, or gives a window alone other hidden states.
        """
        index, sizes = block.index, len(inputs.hidden[0])
        tensors = self._stored_tensors(index, inputs)
        versions = [tensor._version for _, tensor in tensors]
        single = inputs.run(index, block.module, 0, self._device, window=sizes - 1) if sizes > 1 else None
        inputs.advance(index, block.module, self._device)
        for (name, tensor), version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                raise unsupported(self._model, f"block {index} writes into its argument {name}")
        if single is not None and self._differs(single.to(inputs.hidden[0].device), inputs.hidden[0][-1:]):
            raise unsupported(self._model, f"block {index} gives a window other hidden states when it runs alone")

    def _stored_tensors(self, index: int, inputs: BlockInputs) -> list[tuple[str, Tensor]]:
        """List the tensors that block `index` receives as stored, with the names of their arguments."""
        arguments = inputs.calls.arguments[index][0]
        positions = [(f"number {i}", value) for i, value in enumerate(arguments.args, start=1)]
        trees = [("hidden_states", inputs.hidden[0]), *positions, *arguments.kwargs.items()]
        trees.append(("handed on by earlier blocks", inputs.handed_on[0]))
        return [(name, leaf) for name, tree in trees for leaf in leaves(tree) if torch.is_tensor(leaf)]

    def _make_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states, other_args, other_kwargs = split_states(original, args, kwargs)
            names = [*argument_names(original, len(other_args)), *other_kwargs]
            values = dict(zip(names, (*other_args, *other_kwargs.values()), strict=True))
            if index == 0 and self._differs(self._inputs.hidden[0].to(states.device), self._layout.from_model(states)):
                raise unsupported(self._model, f"the inputs of block {index} are not those of its own forward")
            with on_device(self._blocks[index], self._device):
                output = original(*args, **kwargs)
            expected = _sample(self._layout.from_model(hidden_of(output)))
            if self._differs(self._replayed[index].to(expected.device), expected):
                raise unsupported(self._model, self._reason(index, values))
            if index == len(self._blocks) - 1:
                raise _Compared
            return output

        return forward

    def _reason(self, index: int, values: Mapping[str, Any]) -> str:
        """Return why the replay of a block differs: the first argument that differs, if there is one."""
        inputs = self._inputs.copy()
        for block in self._blocks[:index]:
            with on_device(block, self._device):
                inputs.advance(block.index, block.module, self._device)
        call = self._inputs.calls.make_call(index, inputs.handed_on[0], batch=0, window=None, device=self._device)
        replayed = dict(zip(values, (*call.args, *call.kwargs.values()), strict=True))
        name = next((name for name, value in values.items() if self._is_other_tree(replayed[name], value)), None)
        if name is None:
            return f"block {index} gives other hidden states for equal arguments, so it reads something else"
        return f"argument {name} of block {index} differs when the block is replayed"

    def _is_other_tree(self, value: Any, expected: Any) -> bool:
        if torch.is_tensor(value) and torch.is_tensor(expected):
            return self._differs(value, expected)
        items, expected_items = children(value), children(expected)
        if len(items) != len(expected_items) or torch.is_tensor(value) != torch.is_tensor(expected):
            return True
        return any(self._is_other_tree(a, b) for (_, a), (_, b) in zip(items, expected_items, strict=True))

    def _differs(self, states: Tensor, expected: Tensor) -> bool:
        """Return True if more vectors along the last axis differ than rounding explains."""
        if states.shape != expected.shape or not expected.is_floating_point():
            return not torch.equal(states, expected)
        states, expected = (part.float().reshape(-1, *part.shape[-1:]) for part in (states, expected))
        distances, sizes = (states - expected).norm(dim=-1), expected.norm(dim=-1)
        differing = ~(distances <= self._tolerance * sizes.clamp_min(1e-12)) & torch.isfinite(sizes)
        return bool(differing.float().mean() > _DIFFERING_TOKENS)


def _sample(states: Tensor) -> Tensor:
    """Return some features of hidden states (windows, ..., features)."""
    return states[..., :: max(states.shape[-1] // _FEATURES, 1)].clone()
