"""Codec for one tensor of a checkpoint: the parts that it is stored as in a packed directory, and back.

A packed matrix is stored as NAME.mask, NAME.values and NAME.offsets, any other tensor as NAME. With compression the
parts are zstd frames: NAME.mask.zst, and one NAME.values.K.zst for byte K of the elements. Offsets are then left out,
since the mask determines them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import (
    BIT_DTYPES,
    PackedMatrix,
    count_kept,
    is_worth_packing,
    offsets_from_mask,
    pack,
    unpack,
)
from alps.checkpoints.compression import byte_planes, compress, decompress, join_planes
from alps.checkpoints.manifest import TensorRecord

ReadPart = Callable[[str], Tensor]


def should_pack(name: str, tensor: Tensor, names: Collection[str]) -> bool:
    """Decide if a tensor is packed: floating point, two dimensions or more, and enough zeros.

    Args:
        name: of the tensor.
        tensor: of the checkpoint.
        names: of all tensors of the checkpoint; a tensor stays dense when one of its parts would have one of them.
    """
    if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
        return False
    if tensor.element_size() not in BIT_DTYPES:
        return False
    if any(f"{name}.{part}" in names for part in ("mask", "values", "offsets")):
        return False
    rows, columns = _as_matrix(tensor).shape
    return is_worth_packing(rows, columns, count_kept(tensor), tensor.element_size())


def encode_tensor(name: str, tensor: Tensor, packed: bool, compressed: bool) -> dict[str, Tensor]:
    """Return the parts of a tensor by name.

    Args:
        name: of the tensor.
        tensor: to encode.
        packed: store mask and values, not the dense tensor.
        compressed: store zstd frames.
    """
    if not packed:
        return _compress_planes(name, tensor) if compressed else {name: tensor}
    matrix = pack(_as_matrix(tensor))
    mask = matrix.mask.view(*tensor.shape[:-1], matrix.mask.shape[1])
    if compressed:
        return {f"{name}.mask.zst": compress(mask), **_compress_planes(name, matrix.values)}
    return {f"{name}.mask": mask, f"{name}.values": matrix.values, f"{name}.offsets": matrix.offsets}


def decode_tensor(name: str, record: TensorRecord, compressed: bool, read_part: ReadPart) -> Tensor:
    """Return the bits of a tensor in its element order; shape and integer dtype are unspecified.

    Args:
        name: of the tensor.
        record: its entry in the manifest.
        compressed: the parts are zstd frames.
        read_part: returns a part by name.

    Raises:
        ValueError: when the parts contradict each other or the record.
    """
    if record.kept is None:
        elements = torch.Size(record.shape).numel()
        return _decompress_planes(name, elements, record.itemsize, read_part) if compressed else read_part(name)
    return unpack(decode_matrix(name, record, compressed, read_part))


def decode_matrix(name: str, record: TensorRecord, compressed: bool, read_part: ReadPart) -> PackedMatrix:
    """Return the packed matrix of a tensor, all leading dimensions merged into rows.

    With compression its values are the bits as integers.

    Args:
        name: of the tensor.
        record: its entry in the manifest; the tensor is packed.
        compressed: the parts are zstd frames.
        read_part: returns a part by name.

    Raises:
        ValueError: when a part has another size than the record states; `unpack` checks the rest.
    """
    assert record.kept is not None, "the tensor is stored dense"
    rows, columns = torch.Size(record.shape[:-1]).numel(), record.shape[-1]
    words = -(-columns // 32)
    if compressed:
        mask = decompress(read_part(f"{name}.mask.zst"), 4 * rows * words).view(torch.int32).view(rows, words)
        values = _decompress_planes(name, record.kept, record.itemsize, read_part).view(BIT_DTYPES[record.itemsize])
        return PackedMatrix(mask, values, offsets_from_mask(mask, record.kept), columns)
    mask = read_part(f"{name}.mask")
    if mask.shape != (*record.shape[:-1], words):
        raise ValueError("its mask has another shape than stated")
    return PackedMatrix(mask.view(rows, words), read_part(f"{name}.values"), read_part(f"{name}.offsets"), columns)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Merge all leading dimensions into rows; of fused experts, those of one expert follow those of the one before."""
    return tensor.reshape(-1, tensor.shape[-1])


def _compress_planes(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}.values.{k}.zst": compress(plane) for k, plane in enumerate(byte_planes(values))}


def _decompress_planes(name: str, elements: int, itemsize: int, read_part: ReadPart) -> Tensor:
    return join_planes([decompress(read_part(f"{name}.values.{k}.zst"), elements) for k in range(itemsize)])
