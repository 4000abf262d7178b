"""Rows of a packed matrix as dense ones, with torch alone: on any device, and where the kernel was not built."""

from __future__ import annotations

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import BIT_DTYPES


def unpack_rows(mask: Tensor, values: Tensor, offsets: Tensor, columns: int, first: int, last: int) -> Tensor:
    """Rows `first` to `last` (rows, columns) of a sound packed matrix, to the bit.

    Args:
        mask, values, offsets: as in `alps.checkpoints.bitmask_codec.PackedMatrix`, all on one device.
        columns: of the matrix.
        first, last: the first row, and the one behind the last.
    """
    octets = mask[first:last].contiguous().view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    there = (octets.unsqueeze(-1) >> places & 1).view(last - first, -1)[:, :columns].bool()
    begin, end = int(offsets[first]), int(offsets[last])
    bits = BIT_DTYPES[values.element_size()]
    dense = torch.zeros(there.shape, dtype=bits, device=values.device)
    return dense.masked_scatter_(there, values[begin:end].view(bits)).view(values.dtype)
