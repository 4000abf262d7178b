"""Convert 2:4 layers to torch's semi-structured tensors, for the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from alps.core.errors import ConfigError
from alps.inference.convert import packed_modules, replace_module
from alps.inference.packed_experts import PackedExperts
from alps.inference.packed_linear import PackedLinear

# Both libraries of torch, cuSPARSELt and CUTLASS, take multiples of these sizes, and these dtypes.
_ROWS, _COLUMNS = 32, 64
_DTYPES = (torch.bfloat16, torch.float16)


class SemiStructuredLinear(nn.Module):
    """`y = x W^T + b` with a 2:4 weight in torch's semi-structured format, in 0.5625 of the dense bytes.

    Args:
        layer: a packed layer on a GPU for which `is_2_4_compatible` is true. Its weight is unpacked temporarily.
    """

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(to_sparse_semi_structured(layer.to_dense()), requires_grad=False)
        self.register_parameter("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return F.linear(input.contiguous(), self.weight, bias)


def convert_to_semi_structured(model: nn.Module) -> int:
    """Replace every compatible packed layer by a `SemiStructuredLinear`, and return the number of replaced layers.

    Raises:
        ConfigError: if no layer is compatible.
    """
    count = 0
    experts = {layer for module in model.modules() if isinstance(module, PackedExperts) for layer in module.layers}
    for _, layer in list(packed_modules(model)):
        if layer not in experts and is_2_4_compatible(layer):
            replace_module(model, layer, SemiStructuredLinear(layer))
            count += 1
    if not count:
        raise ConfigError(
            "No layer is 2:4 in bfloat16 or float16, with sizes that semi-structured tensors support: prune with "
            "--pattern 2:4, or leave semi_structured out."
        )
    return count


def is_2_4_compatible(layer: PackedLinear) -> bool:
    """Return whether a weight is 2:4 along its inputs, with a dtype and sizes that sparse tensor cores support."""
    sizes_fit = layer.out_features % _ROWS == 0 and layer.in_features % _COLUMNS == 0 and layer.out_features > 0
    return sizes_fit and layer.values.dtype in _DTYPES and has_2_of_4(layer.mask)


def has_2_of_4(mask: Tensor) -> bool:
    """Return whether every group of four columns of a mask of int32 words has at most two bits."""
    pairs = mask - ((mask >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    # Each group of 4 bits holds a count from 0 to 4. After adding 5, its highest bit is set for counts of 3 and 4.
    return not bool(((fours + 0x55555555) & -0x77777778).any())


def check_device(device: torch.device) -> None:
    """Check that a device has sparse tensor cores.

    Raises:
        ConfigError: if it has none.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"Semi-structured layers need an NVIDIA GPU of compute capability 8.0 or newer, which '{device}' is not: "
            "leave semi_structured out."
        )
