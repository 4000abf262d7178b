"""Torch backend: unpack rows of a packed matrix on any device, without a compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import BIT_DTYPES, PackedMatrix


def unpack_rows(packed: PackedMatrix, first: int, last: int) -> Tensor:
    """Return dense rows of a packed matrix, shape (last - first, columns), equal to the bit.

    Args:
        packed: a consistent matrix, with all tensors on one device.
        first: first row.
        last: row after the last one.
    """
    mask, values, offsets = packed.mask, packed.values, packed.offsets
    octets = mask[first:last].contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    is_kept = (octets.unsqueeze(-1) >> shifts & 1).view(last - first, -1)[:, : packed.columns].bool()
    begin, end = int(offsets[first]), int(offsets[last])
    int_dtype = BIT_DTYPES[values.element_size()]
    dense = torch.zeros(is_kept.shape, dtype=int_dtype, device=values.device)
    return dense.masked_scatter_(is_kept, values[begin:end].view(int_dtype)).view(values.dtype)
