"""Sites: the prunable linear maps inside a block, read and written as (out, in) matrices."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Maps that decide where a token goes, by a part of their name: a few weights that move whole experts.
_ROUTERS = re.compile(r"(^|\.)(router|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class Site:
    """One linear map of a block.

    Attributes:
        name: dotted name inside the model, e.g. `model.layers.0.self_attn.q_proj`.
        module: the `nn.Linear` or `Conv1D` that owns the weight.
    """

    name: str
    module: nn.Linear | Conv1D

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`, `fc1`, `c_attn`."""
        return self.name.rpartition(".")[2]

    @property
    def parameter_name(self) -> str:
        """Name of the weight parameter inside the model."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if isinstance(self.module, Conv1D) else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weight is kept and written."""
        dtype: torch.dtype = self.module.weight.dtype
        return dtype

    def read(self) -> Tensor:
        """The weight as (out, in), a view in the checkpoint's dtype; `Conv1D` already turned."""
        weight: Tensor = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    def write(self, weight: Tensor) -> Tensor:
        """Cast `weight` (out, in) once to the checkpoint's dtype, store it, and return what is stored.

        A kept weight that underflows becomes a zero of either sign; stored zeros are always +0.0.
        """
        stored = weight.to(self.dtype)
        stored = torch.where(stored == 0, torch.zeros_like(stored), stored)
        self.read().copy_(stored)
        return stored


def find_sites(prefix: str, block: nn.Module) -> list[Site]:
    """All linear maps of a block but routers in the order of their registration; `prefix` is the block's own name."""
    experts = {name.rpartition(".")[0] for name, _ in block.named_modules() if name.rpartition(".")[2] == "experts"}
    return [
        Site(f"{prefix}.{name}" if name else prefix, module)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_router(name, experts)
    ]


def is_router(name: str, experts: Collection[str]) -> bool:
    """Whether the module `name` of a block routes tokens; `experts` names what in the block holds experts."""
    parent, _, last = name.rpartition(".")
    return bool(_ROUTERS.search(name)) or (last == "gate" and parent in experts)
