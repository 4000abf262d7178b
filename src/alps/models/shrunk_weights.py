"""Weights of a smaller model that is built on the meta device, and gets them block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alps.checkpoints.safetensors_io import TensorOnDisk
from alps.models.blocks import Block, find_blocks, non_block_weights
from alps.models.load import quiet

# Largest weight file, whose tensors transformers copies into memory before it writes them.
_LARGEST_FILE = "1GB"


@dataclass(frozen=True)
class ShrunkModel:
    """A smaller model of transformers.

    Attributes:
        model: its parameters are on the meta device, but for the block that is at work.
        blocks: its decoder blocks.
    """

    model: Any
    blocks: Sequence[Block]

    @classmethod
    def of(cls, model: nn.Module) -> ShrunkModel:
        """Wrap a model that was built from a configuration."""
        return cls(model, find_blocks(model))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.numel() * parameter.dtype.itemsize for parameter in self.model.parameters())

    def release(self, position: int) -> None:
        """Free the weights of a block."""
        module = self.blocks[position].module
        for name, parameter in list(module.named_parameters()):
            _set(module, name, torch.empty_like(parameter, device="meta"))

    def save(
        self, folder: Path, dense: Any, dense_blocks: Sequence[Block], stored: Sequence[Mapping[str, TensorOnDisk]]
    ) -> None:
        """Write the weight files; the tensors of blocks are mapped into memory from the files that hold them.

        Args:
            folder: to write to.
            dense: the dense model, whose parameters outside the blocks are taken.
            dense_blocks: all of its blocks.
            stored: tensors of every block of this model by name inside the block.
        """
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        outside = [name for name, p in self.model.named_parameters() if id(p) not in inside]
        for block, tensors in zip(self.blocks, stored, strict=True):
            fill_module(block.module, {name: tensor.memory_map() for name, tensor in tensors.items()})
        with ExitStack() as stack:
            stack.enter_context(non_block_weights(dense_blocks))
            for name in outside:
                _set(self.model, name, dense.get_parameter(name).detach())
            self.model.tie_weights()
            stack.enter_context(quiet())
            self.model.save_pretrained(folder, max_shard_size=_LARGEST_FILE)


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Give a module on the meta device its parameters and persistent buffers, which get no gradients.

    Args:
        module: to fill.
        tensors: by name inside the module, in the shapes of the module's.
        device: of the parameters; None keeps that of the tensors.
    """
    for name, parameter in list(module.named_parameters()):
        tensor = tensors[name]
        assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} for {tuple(parameter.shape)}"
        _set(module, name, tensor.detach().to(device or tensor.device, parameter.dtype))
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            buffer.copy_(tensors[name])


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner).register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
