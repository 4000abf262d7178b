"""Routers of mixtures of experts: the few weights that decide which experts a token is sent to.

A router is recognised by its place and its shape. A mixture is a module that holds experts: a fused parameter, a list
of equal modules, or a module named `experts`. A router lies next to the experts, and ends with one output per
expert. A module with the word `router` in its name or its class is a router wherever it lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Names of routers that lie next to experts, and parts of the names of their classes.
_ROUTER_NAMES = {"gate", "gating", "switch", "wg"}
_ROUTER_CLASS = re.compile(r"TopK|Gating")


@dataclass
class _Mixture:
    """Children of a module that hold experts, and the numbers of experts."""

    experts: set[str] = field(default_factory=set)
    counts: set[int] = field(default_factory=set)


def is_fused(module: nn.Module, parameter: Tensor) -> bool:
    """Check if a parameter holds one matrix per expert: its first dimension is the module's number of experts."""
    return parameter.ndim == 3 and any(
        "experts" in name and type(value) is int and value == len(parameter) for name, value in vars(module).items()
    )


def find_routers(block: nn.Module) -> list[str]:
    """Return the names of the routers inside a block; whatever lies inside a router belongs to it."""
    mixtures = _find_mixtures(block)
    holders = tuple(f"{name}." for name in mixtures)
    routers = []
    for name, module in block.named_modules():
        # A module around experts is no router, whatever its name.
        if not name or any(holder.startswith(f"{name}.") for holder in holders):
            continue
        mixture = mixtures.get(name.rpartition(".")[0])
        if _is_called_router(name, module) or (mixture is not None and _is_next_to_experts(mixture, name, module)):
            routers.append(name)
    return routers


def routing_parameters(block: nn.Module) -> set[int]:
    """Return the ids of all parameters of routers inside a block, including biases."""
    routing = {id(parameter) for name in find_routers(block) for parameter in block.get_submodule(name).parameters()}
    for name, mixture in _find_mixtures(block).items():
        parameters = block.get_submodule(name).parameters(recurse=False)
        # Of a mixture itself, such as the bias that balances its experts.
        routing |= {id(p) for p in parameters if p.ndim < 3 and mixture.experts and mixture.counts & {*p.shape}}
    return routing


def is_inside(name: str, modules: list[str]) -> bool:
    """Check if a name is that of one of the modules, or of a module inside them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _find_mixtures(block: nn.Module) -> dict[str, _Mixture]:
    """Return the mixtures of a block by name; a module of fused experts is one, too, and may hold a router."""
    mixtures: dict[str, _Mixture] = {}
    for name, module in block.named_modules():
        fused = {len(parameter) for parameter in module.parameters(recurse=False) if is_fused(module, parameter)}
        listed = {len(module)} if isinstance(module, nn.ModuleList) and _is_uniform(module) else set[int]()
        parent, _, last = name.rpartition(".")
        if fused:
            mixtures.setdefault(name, _Mixture()).counts |= fused
        if name and (fused or listed or last == "experts"):
            mixture = mixtures.setdefault(parent, _Mixture())
            mixture.experts.add(name)
            mixture.counts |= fused | listed
    return mixtures


def _is_uniform(modules: nn.ModuleList) -> bool:
    """Check if a list holds several modules of one class with parameters of the same names and shapes."""
    kinds = {(type(module), *((name, p.shape) for name, p in module.named_parameters())) for module in modules}
    return len(modules) > 1 and len(kinds) == 1 and next(modules.parameters(), None) is not None


def _is_called_router(name: str, module: nn.Module) -> bool:
    return "router" in re.split(r"[._]", name.rpartition(".")[2].lower()) or "Router" in type(module).__name__


def _is_next_to_experts(mixture: _Mixture, name: str, module: nn.Module) -> bool:
    """Check if a child of a mixture is its router, or the gate of its shared experts."""
    last = name.rpartition(".")[2]
    if name in mixture.experts:
        return False
    if last in _ROUTER_NAMES or _ROUTER_CLASS.search(type(module).__name__):
        return True
    if "expert" in last:
        return last.endswith("gate")
    shapes = list(_linear_shapes(module))
    if not shapes:
        return False
    outputs, inputs = shapes[-1][0], shapes[0][1]
    is_scalar_gate = outputs == 1 and len(shapes) == 1
    # A layer that keeps the width of the hidden states is part of an expert that all tokens share.
    return is_scalar_gate or (outputs in mixture.counts and outputs != inputs)


def _linear_shapes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the shapes (out, in) of the linear layers in a module, in the order of registration."""
    for child in module.modules():
        if isinstance(child, nn.Linear | Conv1D):
            rows, columns = child.weight.shape
            yield (columns, rows) if isinstance(child, Conv1D) else (rows, columns)
