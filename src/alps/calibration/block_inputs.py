"""Inputs of the blocks for all calibration windows, and replay of single blocks with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_arguments import HandedValues, map_leaves, select_window, to_meta
from alps.calibration.block_calls import NO_CALLS, BlockCalls, BlockOutput
from alps.models.blocks import Block

# Tokens of a batch. On a CPU they fit into its caches, which is as fast for one process and faster for two
# (docs/project/performance.md). On a GPU, and for experts, of which each receives only a part, there are many.
_CPU_BATCH_TOKENS, _BATCH_TOKENS = 512, 4096

# Class of a block, and the names of its sites inside it.
Structure = tuple[type, tuple[str, ...]]


@dataclass
class BlockInputs:
    """Inputs of the blocks for a set of windows of equal length.

    Attributes:
        hidden: one tensor (windows, ..., features) per batch, the inputs of the next block to run.
        calls: the other arguments of all blocks, and how blocks take and return hidden states.
        window_tokens: tokens of a window.
        handed_on: one dict per batch, the values that earlier blocks handed to later ones.
        activations: storage of the hidden states.
        called_once: structures of blocks that called each of their sites exactly once in a forward.
    """

    hidden: list[Tensor]
    calls: BlockCalls = NO_CALLS
    window_tokens: int = 0
    handed_on: list[HandedValues] = field(default_factory=list)
    activations: ActivationStore = field(default_factory=ActivationStore)
    called_once: set[Structure] = field(default_factory=set)
    # Values that earlier blocks handed on for a single window, with the shapes of the tensors only.
    single_handed_on: HandedValues = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.handed_on = self.handed_on or [{} for _ in self.hidden]

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return self.window_tokens * sum(map(len, self.hidden))

    def copy(self) -> BlockInputs:
        """Return the same inputs for another pass over the blocks; tensors are shared."""
        return self.first(None)

    def first(self, batches: int | None) -> BlockInputs:
        """Return a copy with the first batches only, or all for None; tensors are shared."""
        return replace(
            self,
            hidden=self.hidden[:batches],
            handed_on=self.handed_on[:batches],
            single_handed_on=dict(self.single_handed_on),
        )

    def run(
        self, index: int, block: nn.Module, batch: int, device: torch.device, *, window: int | None = None
    ) -> Tensor:
        """Run block `index` on a batch, or on one window of it, and return its hidden states; see `forward`."""
        return self.forward(index, block, batch, device, window=window).hidden

    def forward(
        self, index: int, block: nn.Module, batch: int, device: torch.device, *, window: int | None = None
    ) -> BlockOutput:
        """Run block `index` on a batch, or on one window of it.

        Args:
            index: of the block.
            block: on `device`.
            batch: number of the batch.
            device: where to run.
            window: number of the window in the batch; None for all.

        Returns:
            Hidden states (windows, ..., features), and the values for later blocks.
        """
        hidden, handed_on = self.hidden[batch], self.handed_on[batch]
        if window is not None:
            hidden = hidden[window : window + 1]
            handed_on = {
                key: select_window(value, self.single_handed_on[key], window) for key, value in handed_on.items()
            }
        return self.calls.run(index, block, hidden.to(device), handed_on, batch=batch, window=window)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Replace the inputs of block `index` by its outputs, batch by batch."""
        with torch.no_grad():
            single = None
            for batch in range(len(self.hidden)):
                output = self.forward(index, block, batch, device)
                if output.handed_on and single is None:
                    # The shapes show in which axis a batch's value holds its windows.
                    single = to_meta(self.forward(index, block, batch, device, window=0).handed_on)
                self.replace_batch(batch, output)
            # In place, since a `CachedForward` of the same inputs shares it.
            self.single_handed_on.clear()
            self.single_handed_on.update(single or {})

    def replace_batch(self, batch: int, output: BlockOutput) -> None:
        """Store the outputs of a block for a batch in place of its inputs."""
        original_device = self.hidden[batch].device
        stored_before = {id(tensor) for tensor in _tensors(self.handed_on[batch])}

        def store(states: Tensor) -> Tensor:
            return self.activations.store(
                states.to(original_device) if self.activations.device is None else states.detach()
            )

        del self.hidden[batch]  # freed first, to make room
        self.hidden.insert(batch, store(output.hidden))
        self.handed_on[batch] = map_leaves(
            output.handed_on,
            lambda value: store(value) if torch.is_tensor(value) and id(value) not in stored_before else value,
        )


def _tensors(handed_on: HandedValues) -> list[Tensor]:
    tensors = list[Tensor]()
    map_leaves(handed_on, lambda value: tensors.append(value) if torch.is_tensor(value) else None)
    return tensors


def batch_tokens(blocks: Sequence[Block], device: torch.device) -> int:
    """Return the number of calibration tokens for a forward of a block."""
    has_experts = any(site.expert is not None for block in blocks for site in block.sites)
    return _CPU_BATCH_TOKENS if device.type == "cpu" and not has_experts else _BATCH_TOKENS
