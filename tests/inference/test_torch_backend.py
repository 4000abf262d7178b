"""Rows of a packed matrix unpacked by torch, to the bit."""

from __future__ import annotations

import pytest
import torch

from alps.checkpoints.bitmask_codec import BIT_DTYPES, pack
from alps.inference.torch_backend import unpack_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_rows_are_unpacked_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 70, generator=generator).to(dtype)
    weight[torch.rand(9, 70, generator=generator) < 0.7] = 0
    weight[4] = 0
    weight[2, 3] = -0.0  # a weight, whose bits are not all zero
    packed, bits = pack(weight), BIT_DTYPES[dtype.itemsize]
    for first in range(9):
        for last in range(first + 1, 10):
            rows = unpack_rows(packed, first, last)
            assert rows.dtype == dtype and rows.shape == (last - first, 70)
            assert torch.equal(rows.view(bits), weight[first:last].view(bits))
