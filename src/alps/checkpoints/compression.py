"""Tensors made smaller for transport: bytes of equal weight side by side, then zstd.

Sign and exponent of neighbouring weights are alike, their mantissas are not: the high bytes shrink to less than half,
the low ones stay.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from alps.core.errors import CheckpointError

# Weights and masks repeat nothing, so that higher levels gain little: 9 takes eight times as long for the high bytes
# and leaves the whole 1 % smaller.
_LEVEL = 3


def check_compression() -> None:
    """Make sure that zstd is at hand.

    Raises:
        CheckpointError: when it is not.
    """
    _zstandard()


def compress(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as one zstd frame, which says their number: uint8 (bytes)."""
    frame = _zstandard().ZstdCompressor(level=_LEVEL).compress(raw(tensor))
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, size: int) -> Tensor:
    """The `size` bytes of a frame: uint8 (size).

    Raises:
        ValueError: when it is no such frame.
    """
    zstd = _zstandard()
    data = raw(frame).tobytes()
    try:
        # Looked at before anything is allocated: a damaged frame may claim any size.
        if zstd.get_frame_parameters(data).content_size != size:
            raise ValueError("a zstd frame of it has another size than stated")
        found = zstd.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstd.ZstdError as error:
        raise ValueError(f"a zstd frame of it cannot be read ({error})") from None
    if len(found) != size:
        raise ValueError("a zstd frame of it has another size than stated")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def planes(tensor: Tensor) -> list[Tensor]:
    """Byte k of every element, k from the lowest: uint8 (elements) each."""
    size = tensor.element_size()
    octets = tensor.reshape(-1).view(torch.uint8).view(-1, size)
    return [octets[:, k].contiguous() for k in range(size)]


def join(parts: list[Tensor]) -> Tensor:
    """The bytes of the elements whose planes these are: uint8 (bytes)."""
    return torch.stack(parts, dim=1).reshape(-1)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise CheckpointError("Compressed packs need zstandard: pip install zstandard, or pack without it.") from None
    return zstandard
