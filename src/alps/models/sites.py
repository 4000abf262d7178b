"""Sites: the prunable linear maps inside a block, read and written as (out, in) matrices.

A site is a module of its own, or one expert's slice of a parameter that fuses the maps of all experts. Such a parameter
has the shape (experts, out, in) or (experts, in, out), depending on its class; the products observed during calibration
confirm which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alps.models.linear_maps import ProductCheck, is_linear_layer
from alps.models.routers import find_routers, is_fused, is_inside

# Name of a list of experts with the number of one; experts that all tokens share are layers like others.
_LISTED_EXPERT = re.compile(r"(\.(?!shared)[^.]*experts?)\.\d+(?=\.)")
# Classes that store experts as (experts, in, out) without an attribute `is_transposed`.
_INPUTS_FIRST = {"Llama4TextExperts"}


@dataclass(frozen=True)
class Site:
    """Prunable linear map of a block.

    Attributes:
        name: dotted name inside the model, e.g. `model.layers.0.self_attn.q_proj`; the name of an expert's slice ends
            with its number, e.g. `model.layers.0.mlp.experts.down_proj.3`.
        module: the `nn.Linear`, the `Conv1D`, or the module of experts that owns the weight.
        attribute: name of the parameter inside the module.
        expert: number of the slice in a fused parameter, else None.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    expert: int | None = None

    @property
    def kind(self) -> str:
        """Last part of the name, e.g. `q_proj`, `fc1`, `c_attn`; of a slice the two before its number."""
        if self.expert is None:
            return self.name.rpartition(".")[2]
        return ".".join(self.name.split(".")[-3:-1])

    @property
    def parameter(self) -> nn.Parameter:
        """Parameter that holds the weight; a fused one holds those of other experts, too."""
        return self.module.get_parameter(self.attribute)

    @property
    def parameter_name(self) -> str:
        """Name of the parameter inside the model."""
        if self.expert is None:
            return f"{self.name}.weight"
        fused = self.name.rpartition(".")[0]
        return f"{fused}.weight" if self.attribute == "weight" else fused

    @property
    def place(self) -> str:
        """Name of the parameter without the numbers of experts: the same for all experts of a mixture."""
        return _LISTED_EXPERT.sub(r"\1", self.parameter_name)

    @property
    def is_expert(self) -> bool:
        """True for a map of one expert: a slice of a fused parameter, or a layer inside a list of experts."""
        return self.expert is not None or self.place != self.parameter_name

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        rows, columns = self.parameter.shape[-2:]
        return (columns, rows) if self._inputs_first else (rows, columns)

    @property
    def entries(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the weight is stored."""
        return self.parameter.dtype

    def read(self) -> Tensor:
        """Return the weight as a view of shape (out, in), in the stored dtype."""
        weight = self.parameter.detach()
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self._inputs_first else weight

    def write(self, weight: Tensor) -> Tensor:
        """Cast a weight (out, in) to the stored dtype, store it, and return it as stored.

        Zeros are stored as +0.0. A weight that underflows in the cast becomes such a zero.
        """
        stored = weight.to(self.dtype)
        stored = torch.where(stored == 0, torch.zeros_like(stored), stored)
        self.read().copy_(stored)
        return stored

    @property
    def _inputs_first(self) -> bool:
        if self.expert is None:
            return isinstance(self.module, Conv1D)
        return stores_inputs_first(self.module)


def stores_inputs_first(experts: nn.Module) -> bool:
    """Check if the fused parameters of a module have the shape (experts, in, out), and not (experts, out, in)."""
    return bool(getattr(experts, "is_transposed", type(experts).__name__ in _INPUTS_FIRST))


def find_sites(prefix: str, block: nn.Module, is_product: ProductCheck | None = None) -> list[Site]:
    """List the linear maps of a block in the order of registration, except routers.

    Args:
        prefix: name of the block inside the model.
        block: to search.
        is_product: check of subclasses of linear layers, shared by the blocks of a model; None for a new one.
    """
    is_product = is_product or ProductCheck()
    routers, sites = find_routers(block), list[Site]()
    for name, module in block.named_modules():
        if is_inside(name, routers):
            continue
        full_name = f"{prefix}.{name}" if name else prefix
        if not isinstance(module, nn.Linear | Conv1D):
            sites += _expert_slices(full_name, module)
        elif is_linear_layer(module) and is_product(module):
            sites.append(Site(full_name, module))
    return sites


def _expert_slices(name: str, module: nn.Module) -> Iterator[Site]:
    for attribute, parameter in module.named_parameters(recurse=False):
        if is_fused(module, parameter):
            fused = name if attribute == "weight" else f"{name}.{attribute}"
            yield from (Site(f"{fused}.{expert}", module, attribute, expert) for expert in range(len(parameter)))
