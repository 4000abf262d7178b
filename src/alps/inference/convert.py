"""Replace the linear layers of a model in memory by packed ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, count_kept, is_worth_packing, pack
from alps.core.errors import CheckpointError
from alps.inference.cpu_backend import KINDS
from alps.inference.packed_linear import PackedLinear


def pack_linears(model: nn.Module) -> int:
    """Pack, in place, every linear layer that becomes smaller when packed, and return the number of packed layers.

    As in `alps pack`, only the number of zeros matters, not the method that made them. Weights that are tied to others
    stay dense. At any time at most one layer is in memory both dense and packed.
    """
    tied, count = tied_parameters(model), 0
    for name, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or f"{name}.weight" in tied or not name:
            continue
        weight: Tensor = layer.weight.data
        if weight.dtype not in KINDS or not weight.numel() or not weight.is_cpu:
            continue
        weight = as_out_in(layer, weight)
        if not is_worth_packing(len(weight), weight.shape[1], count_kept(weight), weight.element_size()):
            continue
        set_module(model, name, packed_layer(layer, pack(weight)))
        count += 1
    refuse_saving(model)
    return count


def packed_layer(layer: nn.Module, packed: PackedMatrix) -> PackedLinear:
    """Return a packed layer that replaces `layer` and has its bias."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return PackedLinear(packed, None if bias is None else bias.data, inputs_first=type(layer) is Conv1D)


def as_out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight of a layer as (out, in); a Conv1D stores it as (in, out)."""
    return weight.t().contiguous() if type(layer) is Conv1D else weight


def set_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the submodule `name` of a model by `layer`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def tied_parameters(model: nn.Module) -> set[str]:
    """Return the names of all parameters that the model holds under more than one name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for aliases in names.values() if len(aliases) > 1 for name in aliases}


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Iterate over the layers of a model that are packed in memory, with their names."""
    return (
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLinear) and layer.is_packed
    )


def refuse_saving(model: nn.Module) -> None:
    """Make `save_pretrained` raise, because its checkpoint would load with random weights in packed layers."""
    model.save_pretrained = _refuse  # type: ignore[assignment]


def _refuse(*_args: object, **_kwargs: object) -> None:
    raise CheckpointError(
        "A packed model cannot be saved by save_pretrained: copy its packed directory, or unpack it with `alps unpack`."
    )
