"""The tensors that one tensor of a checkpoint becomes in a packed file, and the way back.

A matrix that is worth packing becomes NAME.mask, NAME.values and NAME.offsets; anything else stays NAME. Compressed,
the parts are zstd frames with `.zst` behind their names, values one frame for each byte of an element, and offsets are
left out, because the mask says them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import BITS, Packed, kept_weights, offsets_from_mask, pack, pays, unpack
from alps.checkpoints.compression import compress, decompress, join, planes


def is_packed(name: str, tensor: Tensor, names: Collection[str]) -> bool:
    """Whether a tensor is to be packed: two dimensions or more, floating point, and enough zeros to pay.

    Args:
        name: of the tensor.
        tensor: of the checkpoint.
        names: of all its tensors; where parts would be called like one of them, the tensor stays dense.
    """
    if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() not in BITS:
        return False
    if any(f"{name}.{part}" in names for part in ("mask", "values", "offsets")):
        return False
    rows, columns = _matrix(tensor).shape
    return pays(rows, columns, kept_weights(tensor), tensor.element_size())


def split(name: str, tensor: Tensor, packed: bool, compressed: bool) -> dict[str, Tensor]:
    """The parts of a tensor by their names."""
    if not packed:
        return _frames(name, tensor) if compressed else {name: tensor}
    found = pack(_matrix(tensor))
    mask = found.mask.view(*tensor.shape[:-1], found.mask.shape[1])
    if compressed:
        return {f"{name}.mask.zst": compress(mask), **_frames(name, found.values)}
    return {f"{name}.mask": mask, f"{name}.values": found.values, f"{name}.offsets": found.offsets}


def merge(
    name: str, shape: list[int], itemsize: int, kept: int | None, compressed: bool, part: Callable[[str], Tensor]
) -> Tensor:
    """The bits of a tensor from its parts, in any shape and in integers of any width.

    Args:
        name: of the tensor.
        shape: in the checkpoint.
        itemsize: bytes of an element.
        kept: weights that are not zero, or None where it is stored dense.
        compressed: whether the parts are zstd frames.
        part: gives a part by its name.

    Raises:
        ValueError: when the parts contradict each other.
    """
    if kept is None:
        elements = torch.Size(shape).numel()
        return _joined(name, elements, itemsize, part) if compressed else part(name)
    return unpack(gather(name, shape, itemsize, kept, compressed, part))


def gather(
    name: str, shape: list[int], itemsize: int, kept: int, compressed: bool, part: Callable[[str], Tensor]
) -> Packed:
    """The matrix of a packed tensor as it is stored; of compressed parts, values are the bits as integers.

    Args:
        name, shape, itemsize, kept, compressed, part: as for `merge`.

    Raises:
        ValueError: when the parts have other sizes than stated; `unpack` checks the rest.
    """
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    words = -(-columns // 32)
    if compressed:
        mask = decompress(part(f"{name}.mask.zst"), 4 * rows * words).view(torch.int32).view(rows, words)
        values = _joined(name, kept, itemsize, part).view(BITS[itemsize])
        return Packed(mask, values, offsets_from_mask(mask, kept), columns)
    mask = part(f"{name}.mask")
    if mask.shape != (*shape[:-1], words):
        raise ValueError("its mask has another shape than stated")
    return Packed(mask.view(rows, words), part(f"{name}.values"), part(f"{name}.offsets"), columns)


def _matrix(tensor: Tensor) -> Tensor:
    """All rows of a tensor below each other: experts of a fused weight, one after the other."""
    return tensor.reshape(-1, tensor.shape[-1])


def _frames(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}.values.{k}.zst": compress(plane) for k, plane in enumerate(planes(values))}


def _joined(name: str, elements: int, itemsize: int, part: Callable[[str], Tensor]) -> Tensor:
    return join([decompress(part(f"{name}.values.{k}.zst"), elements) for k in range(itemsize)])
