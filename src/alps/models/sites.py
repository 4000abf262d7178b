"""Sites: the prunable linear maps inside a block, read and written as (out, in) matrices.

A map is a module of its own, or one expert's slice of a parameter that fuses the maps of all experts: (experts, out,
in) or (experts, in, out). The class says which, and observing a block checks it on the products that are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Maps that decide where a token goes, by a part of their name: a few weights that move whole experts.
_ROUTERS = re.compile(r"(^|\.)(router|shared_expert_gate)(\.|$)")
# Experts stored as (experts, in, out) whose class does not say so in `is_transposed`.
_INPUTS_FIRST = {"Llama4TextExperts"}


@dataclass(frozen=True)
class Site:
    """One linear map of a block.

    Attributes:
        name: dotted name inside the model, e.g. `model.layers.0.self_attn.q_proj`; an expert's slice ends with its
            number, as in `model.layers.0.mlp.experts.down_proj.3`.
        module: the `nn.Linear`, the `Conv1D` or the module of experts that owns the weight.
        attribute: name of the parameter inside the module.
        expert: number of the slice in a fused parameter, else None.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    expert: int | None = None

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`, `fc1`, `c_attn`; of a slice the last two: `experts.down_proj`."""
        if self.expert is None:
            return self.name.rpartition(".")[2]
        return ".".join(self.name.split(".")[-3:-1])

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, alone or with those of other experts."""
        return self.module.get_parameter(self.attribute)

    @property
    def parameter_name(self) -> str:
        """Name of that parameter inside the model."""
        if self.expert is None:
            return f"{self.name}.weight"
        fused = self.name.rpartition(".")[0]
        return f"{fused}.weight" if self.attribute == "weight" else fused

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.parameter.shape[-2:]
        return (columns, rows) if self._inputs_first else (rows, columns)

    @property
    def entries(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weight is kept and written."""
        return self.parameter.dtype

    def read(self) -> Tensor:
        """The weight as (out, in), a view in the checkpoint's dtype; already turned where it is stored as (in, out)."""
        weight = self.parameter.detach()
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self._inputs_first else weight

    def write(self, weight: Tensor) -> Tensor:
        """Cast `weight` (out, in) once to the checkpoint's dtype, store it, and return what is stored.

        A kept weight that underflows becomes a zero of either sign; stored zeros are always +0.0.
        """
        stored = weight.to(self.dtype)
        stored = torch.where(stored == 0, torch.zeros_like(stored), stored)
        self.read().copy_(stored)
        return stored

    @property
    def _inputs_first(self) -> bool:
        if self.expert is None:
            return isinstance(self.module, Conv1D)
        return bool(getattr(self.module, "is_transposed", type(self.module).__name__ in _INPUTS_FIRST))


def find_sites(prefix: str, block: nn.Module) -> list[Site]:
    """All linear maps of a block but routers in the order of their registration; `prefix` is the block's own name."""
    routers, found = set(_routers(block)), list[Site]()
    for name, module in block.named_modules():
        if name in routers:
            continue
        full = f"{prefix}.{name}" if name else prefix
        if isinstance(module, nn.Linear | Conv1D):
            found.append(Site(full, module))
        else:
            found += _slices(full, module)
    return found


def routing_parameters(module: nn.Module) -> set[int]:
    """Ids of all parameters of a block or a model that belong to a router, biases among them."""
    return {id(parameter) for name in _routers(module) for parameter in module.get_submodule(name).parameters()}


def _routers(module: nn.Module) -> list[str]:
    """Names of the modules inside that route tokens: by their own name, or as the gate beside some experts."""
    names = [name.rpartition(".") for name, _ in module.named_modules()]
    beside = {parent for parent, _, last in names if last == "experts"}
    whole = [("".join(parts), parts) for parts in names]
    return [name for name, (parent, _, last) in whole if _ROUTERS.search(name) or (last == "gate" and parent in beside)]


def is_fused(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter of `module` holds one matrix for every expert: by its first dimension, their number."""
    return parameter.ndim == 3 and any(
        "experts" in name and type(value) is int and value == len(parameter) for name, value in vars(module).items()
    )


def _slices(name: str, module: nn.Module) -> Iterator[Site]:
    for attribute, parameter in module.named_parameters(recurse=False):
        if is_fused(module, parameter):
            fused = name if attribute == "weight" else f"{name}.{attribute}"
            yield from (Site(f"{fused}.{expert}", module, attribute, expert) for expert in range(len(parameter)))
