"""Parameters of a model that are not pruned, each with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from alps.models.blocks import Block, find_blocks, shared_parameters
from alps.models.routers import routing_parameters

# Names of parameters that fuse several matrices.
_MATRICES = re.compile("weight|proj|expert")


@dataclass(frozen=True)
class DenseParameter:
    """Matrix-like parameter that is not pruned: name, shape, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


def dense_parameters(model: nn.Module, pruned: set[str]) -> list[DenseParameter]:
    """List the parameters with two or more dimensions that are not pruned, with the reason.

    Norm weights and biases have one dimension and are never candidates.

    Args:
        model: a decoder-only model.
        pruned: names of pruned parameters, which are left out.
    """
    blocks, embeddings = find_blocks(model), _embeddings(model)
    prefixes = tuple(f"{block.name}." for block in blocks)
    in_blocks = _reasons_in_blocks(model, blocks)
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in pruned:
            continue
        if id(parameter) in embeddings:
            reason = "embedding or output head"
        elif not name.startswith(prefixes):
            reason = "outside the decoder blocks"
        else:
            reason = in_blocks.get(id(parameter)) or _reason_of_owner(model, name)
        rows.append(DenseParameter(name, tuple(parameter.shape), reason))
    return rows


def _embeddings(model: nn.Module) -> set[int]:
    modules = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    modules += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _reasons_in_blocks(model: nn.Module, blocks: list[Block]) -> dict[int, str]:
    """Return reasons that do not depend on the class of the owner, by the id of the parameter; the first one counts."""
    routing = {identity for block in blocks for identity in routing_parameters(block.module)}
    sites = {id(site.parameter) for block in blocks for site in block.sites}
    return {
        **dict.fromkeys(sites, "a forward on text does not call it as a layer"),
        **dict.fromkeys(shared_parameters(model), "shared by several layers"),
        **dict.fromkeys(routing, "router of a mixture of experts"),
    }


def _reason_of_owner(model: nn.Module, name: str) -> str:
    """Return the reason for a parameter that is no site because of the module that owns it."""
    owner_name, _, attribute = name.rpartition(".")
    owner, parameter = model.get_submodule(owner_name), model.get_parameter(name)
    kind = type(owner).__name__
    if isinstance(owner, _ConvNd):
        return "convolution"
    if isinstance(owner, nn.Linear | Conv1D) and attribute == "weight":
        return f"{kind} computes something else than the product of its inputs and its weight"
    if attribute.endswith("bias") and "position" not in attribute:
        return "bias"
    if "Norm" in kind:
        return "norm"
    if parameter.ndim > 2 and min(parameter.shape) > 1 and _MATRICES.search(attribute):
        return f"fused {parameter.ndim}-D weights are not supported"
    return f"parameter of {kind}, which is no linear layer"
