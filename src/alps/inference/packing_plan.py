"""Plan of which weights of a packed checkpoint stay packed in memory, and why the others are dense there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from alps.inference.convert import tied_parameters
from alps.models.linear_maps import ProductCheck, is_linear_layer
from alps.models.recorded_tensor import RecordedTensor
from alps.models.routers import is_fused

READ_BY_CODE = "the model's code reads the weight, and does not call the layer"


@dataclass
class PackingPlan:
    """Packed tensors of a checkpoint that stay packed in memory, and reasons why the others are dense there.

    Attributes:
        layers: layers that stay packed, with the names of their weights in the checkpoint.
        experts: fused parameters of experts that stay packed, each as its owner and the attribute there.
        dense: reasons why other packed tensors are dense in memory, by their names in the checkpoint.
    """

    layers: dict[nn.Module, str] = field(default_factory=dict)
    experts: list[tuple[nn.Module, str]] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)


def plan_packing(
    model: nn.Module, is_packed: Callable[[str], bool], is_read: Callable[[str], bool] = lambda _: False
) -> PackingPlan:
    """Decide for every packed tensor of a checkpoint whether it stays packed in memory.

    Args:
        model: its parameters are records of the tensors of the checkpoint.
        is_packed: returns whether a tensor of the checkpoint is packed on disk.
        is_read: returns whether code of the model reads a tensor of the checkpoint, and does not call its layer.
    """
    plan, tied, is_product = PackingPlan(), tied_parameters(model), ProductCheck()
    for name, owner, attribute, parameter in _recorded_parameters(model):
        packed = [source for source in parameter.sources if is_packed(source)]
        if not packed:
            continue
        reason = f"{type(owner).__name__} is no linear layer"
        if name in tied:
            reason = "it is tied to another weight"
        elif is_fused(owner, parameter):
            plan.experts.append((owner, attribute))
            continue
        elif attribute == "weight" and is_linear_layer(owner):
            if parameter.source is None:
                reason = "it is computed from the tensors of the checkpoint"
            elif is_read(parameter.source):
                reason = READ_BY_CODE
            elif is_product(owner):
                plan.layers[owner] = parameter.source
                continue
            else:
                reason = f"{type(owner).__name__} computes something else than the product with it"
        plan.dense |= dict.fromkeys(packed, reason)
    return plan


def _recorded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, RecordedTensor]]:
    """Iterate over the recorded parameters of a model: name, owner, attribute there, and the parameter."""
    for owner_name, owner in model.named_modules():
        for attribute, parameter in owner._parameters.items():
            if isinstance(parameter, RecordedTensor):
                yield f"{owner_name}.{attribute}" if owner_name else attribute, owner, attribute, parameter
