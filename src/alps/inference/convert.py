"""Layers of a model in memory are replaced by packed ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, count_kept, is_worth_packing, pack
from alps.core.errors import CheckpointError
from alps.inference.cpu_backend import KINDS
from alps.inference.packed_linear import PackedLinear


def pack_linears(model: nn.Module) -> int:
    """Pack every linear layer that becomes smaller by it, in place; returns how many.

    What counts is as for `alps pack`: enough zeros, whoever put them there. Weights that are tied to others stay dense.
    One layer at a time is in memory twice.
    """
    tied, count = tied_parameters(model), 0
    for name, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or f"{name}.weight" in tied or not name:
            continue
        weight: Tensor = layer.weight.data
        if weight.dtype not in KINDS or not weight.numel() or not weight.is_cpu:
            continue
        weight = rows_out(layer, weight)
        if not is_worth_packing(len(weight), weight.shape[1], count_kept(weight), weight.element_size()):
            continue
        put(model, name, packed_layer(layer, pack(weight)))
        count += 1
    refuse_saving(model)
    return count


def packed_layer(layer: nn.Module, packed: PackedMatrix) -> PackedLinear:
    """A packed layer in the place of a dense one, with its bias."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return PackedLinear(packed, None if bias is None else bias.data)


def rows_out(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (out, in): a Conv1D has it the other way round."""
    return weight.t().contiguous() if type(layer) is Conv1D else weight


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set the module of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def tied_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that other names have, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """All packed layers by their names."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLinear))


def refuse_saving(model: nn.Module) -> None:
    """Let `save_pretrained` raise: transformers would give every packed layer of what it wrote random weights."""
    model.save_pretrained = _refuse  # type: ignore[assignment]


def _refuse(*_args: object, **_kwargs: object) -> None:
    raise CheckpointError("A packed model is not saved by save_pretrained: copy its packed directory, or unpack it.")
