"""Lossless compression of tensors: bytes of equal significance are grouped into planes, then compressed by zstd.

Neighbouring weights have similar signs and exponents, but unrelated mantissas: planes of high bytes shrink to less than
half, those of low bytes do not shrink.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from alps.core.errors import CheckpointError

# Weights and masks hold no repetitions for higher levels to find: level 9 takes eight times as long for the high bytes,
# and the whole becomes 1 % smaller.
_ZSTD_LEVEL = 3


def check_compression() -> None:
    """Check that the package zstandard is installed.

    Raises:
        CheckpointError: when it is not.
    """
    _zstandard()


def compress(tensor: Tensor) -> Tensor:
    """Compress the bytes of a tensor to one zstd frame, which states their number: uint8, shape (bytes,)."""
    frame = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(raw_bytes(tensor))
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, size: int) -> Tensor:
    """Decompress one zstd frame.

    Args:
        frame: uint8, shape (bytes,).
        size: number of decompressed bytes.

    Returns:
        uint8, shape (size,).

    Raises:
        ValueError: when it is not a zstd frame of that size.
    """
    zstd = _zstandard()
    data = raw_bytes(frame).tobytes()
    try:
        # Compared before anything is allocated: a damaged frame can claim any size.
        if zstd.get_frame_parameters(data).content_size != size:
            raise ValueError("a zstd frame of it has another size than stated")
        content = zstd.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstd.ZstdError as error:
        raise ValueError(f"a zstd frame of it cannot be read ({error})") from None
    if len(content) != size:
        raise ValueError("a zstd frame of it has another size than stated")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def byte_planes(tensor: Tensor) -> list[Tensor]:
    """Split a tensor into one plane per byte of an element, the lowest first: uint8, shape (elements,) each."""
    size = tensor.element_size()
    octets = tensor.reshape(-1).view(torch.uint8).view(-1, size)
    return [octets[:, k].contiguous() for k in range(size)]


def join_planes(planes: list[Tensor]) -> Tensor:
    """Return the bytes of the elements that `byte_planes` split: uint8, shape (bytes,)."""
    return torch.stack(planes, dim=1).reshape(-1)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy when it is contiguous."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise CheckpointError("Compressed packs need zstandard: pip install zstandard, or pack without it.") from None
    return zstandard
