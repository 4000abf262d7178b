"""Layers pruned to 2:4 as torch's semi-structured tensors, for the sparse tensor cores of NVIDIA's GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from alps.core.errors import ConfigError
from alps.inference.convert import packed_modules, put
from alps.inference.packed_linear import PackedLinear

# What both of torch's libraries, cuSPARSELt and CUTLASS, take.
_ROWS, _COLUMNS = 32, 64
_DTYPES = (torch.bfloat16, torch.float16)


class SemiStructuredLinear(nn.Module):
    """`y = x W^T + b` with W 2:4 as torch keeps it, in 0.5625 of the dense bytes; torch chooses the library.

    Args:
        layer: a packed layer that `suits`, on a GPU. Its weight is dense for a moment.
    """

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(to_sparse_semi_structured(layer.to_dense()), requires_grad=False)
        self.register_parameter("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return F.linear(input.contiguous(), self.weight, bias)


def semi_structure(model: nn.Module) -> int:
    """Put a `SemiStructuredLinear` in the place of every packed layer that suits; returns how many.

    Raises:
        ConfigError: when none does.
    """
    count = 0
    for name, layer in list(packed_modules(model)):
        if suits(layer):
            put(model, name, SemiStructuredLinear(layer))
            count += 1
    if not count:
        raise ConfigError(
            "No layer has 2 of every 4 inputs in bfloat16 or float16, and sizes that semi-structured tensors take: "
            "prune with --pattern 2:4, or leave semi_structured out."
        )
    return count


def suits(layer: PackedLinear) -> bool:
    """Whether a layer's weight is 2:4 along its inputs, in a dtype and of sizes that sparse tensor cores take."""
    sizes = layer.out_features % _ROWS == 0 and layer.in_features % _COLUMNS == 0 and layer.out_features > 0
    return sizes and layer.values.dtype in _DTYPES and has_2_of_4(layer.mask)


def has_2_of_4(mask: Tensor) -> bool:
    """Whether every four columns, counted from the first, have two bits or fewer in a mask of int32 words."""
    pairs = mask - ((mask >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    # Counts of 0 to 4, each in 4 bits of its own: with 5 added the highest one tells 3 and 4 apart from the rest.
    return not bool(((fours + 0x55555555) & -0x77777778).any())


def check_device(device: torch.device) -> None:
    """Make sure that a device has sparse tensor cores.

    Raises:
        ConfigError: when it has none.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"Semi-structured layers need a GPU of NVIDIA's of compute capability 8.0 or newer, which '{device}' is "
            "not: leave semi_structured out."
        )
