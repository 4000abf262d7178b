"""Mapping from the tensors of a model to the tensors of its checkpoint, whose names may differ.

Most checkpoints use the names of the model, with or without the prefix of the base model. Checkpoints of mixtures of
experts hold one matrix per expert and projection, which transformers 5 stacks into one parameter. The rules are data: a
regular expression for the parameter's name, and the names of its parts. When no rule matches, the checkpoint is loaded
whole by transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.checkpoints.safetensors_io import TensorOnDisk

# Name of a parameter, and the names of its parts in row order; `{e}` is the number of an expert.
_STACKED: list[tuple[str, tuple[str, ...]]] = [
    (r"(.*)\.experts\.gate_up_proj", (r"\1.experts.{e}.gate_proj.weight", r"\1.experts.{e}.up_proj.weight")),
    (r"(.*)\.experts\.down_proj", (r"\1.experts.{e}.down_proj.weight",)),
    (
        r"(.*)\.mlp\.experts\.gate_up_proj",
        (r"\1.block_sparse_moe.experts.{e}.w1.weight", r"\1.block_sparse_moe.experts.{e}.w3.weight"),
    ),
    (r"(.*)\.mlp\.experts\.down_proj", (r"\1.block_sparse_moe.experts.{e}.w2.weight",)),
]
# Name of a parameter, and its name in the checkpoint.
_RENAMED: list[tuple[str, str]] = [
    (r"lm_head\.weight", r"embed_out.weight"),
    (r"(.*)\.mlp\.(?:gate|router)\.weight", r"\1.block_sparse_moe.gate.weight"),
    (r"(.*)\.block_sparse_moe\.experts\.gate_up_proj", r"\1.block_sparse_moe.input_linear.weight"),
    (r"(.*)\.block_sparse_moe\.experts\.down_proj", r"\1.block_sparse_moe.output_linear.weight"),
    (r"(.*)\.block_sparse_moe\.router\.weight", r"\1.block_sparse_moe.router.layer.weight"),
    (r"(.*)\.mlp\.gate\.moe_statics\.(.*)", r"\1.mlp.moe_statics.\2"),
]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class KeyMapping:
    """Tensors of a checkpoint that one tensor of a model consists of.

    Attributes:
        parts: names in the checkpoint. A plain tensor is one row of one name. In a stacked tensor, row i names the
            parts of slice i along the first dimension, one below the other.
        rows: number of rows of each part of a slice; empty for a plain tensor.
    """

    parts: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] = ()

    def load(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor of the model.

        Args:
            read: returns a tensor of the checkpoint by name.
        """
        if not self.rows:
            return read(self.parts[0][0])
        first = read(self.parts[0][0])
        stacked = first.new_empty((len(self.parts), sum(self.rows), *first.shape[1:]))
        for number, names in enumerate(self.parts):
            for name, target in zip(names, torch.split(stacked[number], list(self.rows)), strict=True):
                target.copy_(read(name))
        return stacked

    def slice_for(self, name: str, stacked: TensorOnDisk) -> TensorOnDisk:
        """Return the part of a model's tensor on disk that corresponds to one tensor of the checkpoint.

        Args:
            name: of the tensor of the checkpoint.
            stacked: the tensor of the model.
        """
        if not self.rows:
            return stacked
        number, names = next((number, names) for number, names in enumerate(self.parts) if name in names)
        position, row_shape = names.index(name), stacked.shape[2:]
        rows_above = number * sum(self.rows) + sum(self.rows[:position])
        start = rows_above * torch.Size(row_shape).numel()
        return stacked.contiguous_slice(start, (self.rows[position], *row_shape))


def find_key_mapping(name: str, shape: torch.Size, stored: Shapes, prefix: str) -> KeyMapping | None:
    """Find the tensors of a checkpoint that a tensor of a model consists of.

    Args:
        name: of the tensor in the model.
        shape: of the tensor in the model.
        stored: shapes of the checkpoint's tensors by name.
        prefix: of names in the base model, such as `model` or `transformer`.

    Returns:
        The mapping; None when no rule gives tensors of the right shape.
    """
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    candidates += [re.sub(rule, renamed, name) for rule, renamed in _RENAMED if re.fullmatch(rule, name)]
    for candidate in candidates:
        if stored.get(candidate) == tuple(shape):
            return KeyMapping(((candidate,),))
    for rule, part_names in _STACKED:
        if (match := re.fullmatch(rule, name)) and len(shape) > 2:
            parts = tuple(tuple(match.expand(part).format(e=e) for part in part_names) for e in range(shape[0]))
            if all(part in stored for row in parts for part in row):
                rows = tuple(stored[part][0] for part in parts[0])
                part_shapes = [(size, *shape[2:]) for size in rows]
                if sum(rows) == shape[1] and all([stored[part] for part in row] == part_shapes for row in parts):
                    return KeyMapping(parts, rows)
    return None
