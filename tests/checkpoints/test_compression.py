"""Frames of zstd and planes of bytes: exact, and not believed."""

from __future__ import annotations

import pytest
import torch

from alps.checkpoints.compression import byte_planes, compress, decompress, join_planes, raw_bytes


def test_a_frame_is_not_believed() -> None:
    octets = torch.arange(200, dtype=torch.uint8)
    frame = compress(octets)
    assert torch.equal(decompress(frame, 200), octets)
    with pytest.raises(ValueError, match="another size"):
        decompress(frame, 199)
    with pytest.raises(ValueError, match="cannot be read"):
        decompress(frame[:-3], 200)
    with pytest.raises(ValueError, match="cannot be read"):
        decompress(octets, 200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str)
def test_planes_hold_the_bytes_of_equal_significance(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    octets = torch.arange(6 * size, dtype=torch.uint8)
    tensor = octets.view(dtype).view(2, 3)
    planes = byte_planes(tensor)
    assert [plane.tolist() for plane in planes] == [octets[k::size].tolist() for k in range(size)]
    assert torch.equal(join_planes(planes), octets) and bytes(raw_bytes(tensor)) == bytes(octets.tolist())


def test_high_bytes_of_weights_shrink_and_an_empty_tensor_has_a_frame() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    low, high = (len(compress(plane)) / plane.numel() for plane in byte_planes(weight))
    assert high < 0.5 and low > 0.95
    assert decompress(compress(torch.empty(0)), 0).shape == (0,)
