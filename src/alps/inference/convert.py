"""Replace the linear layers of a model in memory by packed ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, count_kept, is_worth_packing, pack
from alps.core.errors import CheckpointError
from alps.inference.cpu_backend import KINDS
from alps.inference.packed_experts import replace_experts, run_experts_singly
from alps.inference.packed_linear import PackedLinear
from alps.models.linear_maps import ProductCheck, is_linear_layer
from alps.models.routers import is_fused


def pack_linears(model: nn.Module) -> int:
    """Pack, in place, every linear layer that becomes smaller when packed, and return the number of packed layers.

    Fused experts are packed as well, and each matrix of them counts as a layer. As in `alps pack`, only the number of
    zeros matters, not the method that made them. Weights that are tied to others stay dense. At any time at most one
    layer is in memory both dense and packed.
    """
    tied, is_product, count = tied_parameters(model), ProductCheck(), 0
    for name, layer in list(model.named_modules()):
        if f"{name}.weight" in tied or not name or not is_linear_layer(layer) or not is_product(layer):
            continue
        weight = as_out_in(layer, layer.get_parameter("weight").data)
        if _is_worth_packing(weight):
            replace_module(model, layer, packed_layer(layer, pack(weight)))
            count += 1
    for name, module in list(model.named_modules()):
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None or f"{name}.{attribute}" in tied or not is_fused(module, parameter):
                continue
            if _is_worth_packing(parameter.data):
                replace_experts(module, attribute, parameter.data)
                count += len(parameter)
    run_experts_singly(model)
    refuse_saving(model)
    return count


def _is_worth_packing(weight: Tensor) -> bool:
    if weight.dtype not in KINDS or not weight.numel() or not weight.is_cpu:
        return False
    rows, columns = weight.numel() // weight.shape[-1], weight.shape[-1]
    return is_worth_packing(rows, columns, count_kept(weight), weight.element_size())


def packed_layer(layer: nn.Module, packed: PackedMatrix) -> PackedLinear:
    """Return a packed layer that replaces `layer` and has its bias."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return PackedLinear(packed, None if bias is None else bias.data, inputs_first=isinstance(layer, Conv1D))


def as_out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight of a layer as (out, in); a Conv1D stores it as (in, out)."""
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a submodule in every place of a model that holds it."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, attribute, new)


def tied_parameters(model: nn.Module) -> set[str]:
    """Return the names of all parameters that several modules hold; a module may be in several places."""
    names: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{owner}.{attribute}" if owner else attribute)
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
        "A model that was packed in memory cannot be saved by save_pretrained: save the dense model, and pack its "
        "directory with `alps pack`."
    )
