"""Where in a checkpoint the tensors of a module tree lie, when their names differ.

Most checkpoints name tensors as the modules do, or leave the prefix of the base model out. Mixtures of experts keep one
matrix for every expert and map, which transformers 5 stacks into one parameter. The rules are data: an expression for
the parameter's name, and how its parts are called. A parameter that no rule finds is nobody's guess: the checkpoint is
then loaded whole, by transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.checkpoints.safetensors_io import TensorOnDisk

# (name of a parameter, what its parts are called): `{e}` is the number of an expert, its parts lie below each other.
_STACKED: list[tuple[str, tuple[str, ...]]] = [
    (r"(.*)\.experts\.gate_up_proj", (r"\1.experts.{e}.gate_proj.weight", r"\1.experts.{e}.up_proj.weight")),
    (r"(.*)\.experts\.down_proj", (r"\1.experts.{e}.down_proj.weight",)),
    (
        r"(.*)\.mlp\.experts\.gate_up_proj",
        (r"\1.block_sparse_moe.experts.{e}.w1.weight", r"\1.block_sparse_moe.experts.{e}.w3.weight"),
    ),
    (r"(.*)\.mlp\.experts\.down_proj", (r"\1.block_sparse_moe.experts.{e}.w2.weight",)),
]
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
    """The tensors of a checkpoint that one tensor of a module tree is made of.

    Attributes:
        parts: names in the checkpoint. One row of one name is the tensor itself. Stacked, every row is a slice along
            the first dimension, made of parts below each other.
        rows: of the parts of a slice, in their order; empty unless stacked.
    """

    parts: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] = ()

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from parts by their names."""
        if not self.rows:
            return read(self.parts[0][0])
        first = read(self.parts[0][0])
        whole = first.new_empty((len(self.parts), sum(self.rows), *first.shape[1:]))
        for number, names in enumerate(self.parts):
            for name, piece in zip(names, torch.split(whole[number], list(self.rows)), strict=True):
                piece.copy_(read(name))
        return whole

    def section(self, whole: TensorOnDisk, name: str) -> TensorOnDisk:
        """Where the part called `name` lies in a file that holds the tensor whole."""
        if not self.rows:
            return whole
        number, names = next((n, names) for n, names in enumerate(self.parts) if name in names)
        place, rest = names.index(name), whole.shape[2:]
        above = number * sum(self.rows) + sum(self.rows[:place])
        return whole.contiguous_slice(above * torch.Size(rest).numel(), (self.rows[place], *rest))


def find_origin(name: str, shape: torch.Size, stored: Shapes, prefix: str) -> KeyMapping | None:
    """Where a tensor of a module tree lies in a checkpoint; None when no rule finds it in its whole shape.

    Args:
        name, shape: of the tensor.
        stored: shapes of the checkpoint's tensors by name.
        prefix: what the names of the base model begin with, `model` or `transformer`.
    """
    names = [name]
    if prefix:
        names += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    names += [re.sub(rule, found, name) for rule, found in _RENAMED if re.fullmatch(rule, name)]
    for one in names:
        if stored.get(one) == tuple(shape):
            return KeyMapping(((one,),))
    for rule, found in _STACKED:
        if (match := re.fullmatch(rule, name)) and len(shape) > 2:
            parts = tuple(tuple(match.expand(part).format(e=e) for part in found) for e in range(shape[0]))
            if all(part in stored for row in parts for part in row):
                rows = tuple(stored[part][0] for part in parts[0])
                wanted = [(size, *shape[2:]) for size in rows]
                if sum(rows) == shape[1] and all([stored[part] for part in row] == wanted for row in parts):
                    return KeyMapping(parts, rows)
    return None
