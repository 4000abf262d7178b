"""Codec for one sparse matrix: a bitmask of the weights that are not zero, and their values.

A weight counts as zero when all its bits are zero, so that -0.0 and every NaN are preserved bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32  # columns in a word of the mask
# Integer dtypes that carry the bits of an element, by its bytes.
BIT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A matrix is packed when that saves at least 5 %; a smaller gain is not worth the time of unpacking.
_MAX_PACKED_RATIO = 0.95


@dataclass(frozen=True)
class PackedMatrix:
    """Matrix without its zeros.

    Attributes:
        mask: int32, shape (rows, words); bit j of word w of a row is column 32 w + j, and bits past the last column are
            0.
        values: the weights that are not zero, row by row in the order of the columns, in their own dtype; no gaps
            between rows.
        offsets: int32, or int64 above 2**31 - 1 weights, shape (rows + 1,); row i is
            `values[offsets[i] : offsets[i + 1]]`.
        columns: number of columns of the matrix.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.mask.nbytes + self.values.nbytes + self.offsets.nbytes


def pack(weight: Tensor) -> PackedMatrix:
    """Pack a matrix (rows, columns) with at least one column, of elements of 1, 2, 4 or 8 bytes."""
    columns = weight.shape[1]
    is_kept = _bits(weight) != 0
    values = _bits(weight)[is_kept].view(weight.dtype)
    offsets = is_kept.new_zeros(len(weight) + 1, dtype=_offset_dtype(len(values)))
    offsets[1:] = _row_counts(is_kept).cumsum(0)
    return PackedMatrix(to_words(is_kept), values, offsets, columns)


def unpack(packed: PackedMatrix) -> Tensor:
    """Return the matrix that was packed, with the same bits.

    Raises:
        ValueError: when mask, values and offsets contradict each other.
    """
    is_kept = _decode_mask(packed)
    bits = torch.zeros(is_kept.shape, dtype=BIT_DTYPES[packed.values.element_size()])
    return bits.masked_scatter_(is_kept, _bits(packed.values)).view(packed.values.dtype)


def check_packed(packed: PackedMatrix) -> None:
    """Check that mask, values and offsets belong together.

    Raises:
        ValueError: when they contradict each other.
    """
    _decode_mask(packed)


def count_kept(weight: Tensor) -> int:
    """Count the weights that have any bit set."""
    return int(torch.count_nonzero(_bits(weight)))


def packed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Return the bytes of a packed matrix with `kept` weights of `itemsize` bytes each."""
    return 4 * rows * _word_count(columns) + kept * itemsize + _offset_dtype(kept).itemsize * (rows + 1)


def is_worth_packing(rows: int, columns: int, kept: int, itemsize: int) -> bool:
    """Check if packing saves 5 % of a matrix: from about 11 % zeros on in bfloat16, 8 % in float32."""
    return packed_bytes(rows, columns, kept, itemsize) < _MAX_PACKED_RATIO * rows * columns * itemsize


def offsets_from_mask(mask: Tensor, kept: int) -> Tensor:
    """Compute the offsets of a packed matrix.

    Args:
        mask: int32, shape (rows, words).
        kept: number of bits set in the mask.
    """
    offsets = mask.new_zeros(len(mask) + 1, dtype=_offset_dtype(kept))
    offsets[1:] = _row_counts(from_words(mask)).cumsum(0)
    return offsets


def check_layout(packed: PackedMatrix, bias: Tensor | None, dtypes: Collection[torch.dtype]) -> None:
    """Check shapes, dtypes, devices and strides of a packed matrix before a kernel reads it; contents are not read.

    Args:
        packed: the matrix.
        bias: shape (rows,) in the dtype of the values, or None.
        dtypes: valid dtypes of the values.

    Raises:
        ValueError: when a shape or dtype is wrong, a tensor is not contiguous, or they are on several devices.
    """
    mask, values, offsets = packed.mask, packed.values, packed.offsets
    rows = len(mask)
    shapes = mask.shape == (rows, _word_count(packed.columns)), offsets.shape == (rows + 1,), values.ndim == 1
    types = mask.dtype == torch.int32, offsets.dtype in (torch.int32, torch.int64), values.dtype in dtypes
    tensors = [tensor for tensor in (mask, values, offsets, bias) if tensor is not None]
    if not all((*shapes, *types, *(t.is_contiguous() and t.device == values.device for t in tensors))):
        raise ValueError("mask, values and offsets are not those of a packed matrix on one device")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != values.dtype):
        raise ValueError("the bias has another length or dtype than the matrix")


def to_words(is_kept: Tensor) -> Tensor:
    """Convert booleans (rows, columns) to int32 words (rows, words) on the same device."""
    rows, columns = is_kept.shape
    padded = is_kept.new_zeros(rows, WORD_BITS * _word_count(columns))
    padded[:, :columns] = is_kept
    groups = padded.view(torch.uint8).view(rows, 4 * _word_count(columns), 8)
    octets = groups.new_zeros(groups.shape[:2])
    for bit in range(8):
        octets |= groups[:, :, bit] << bit
    return octets.view(torch.int32)


def from_words(words: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """Convert int32 words (rows, words) to booleans (rows, 32 words) on the same device.

    Args:
        words: from `to_words`.
        dtype: bool, or an integer dtype in which every set bit becomes an element with all bits set.
    """
    octets = words.contiguous().view(torch.uint8).flatten()
    # A lookup of the eight elements of a byte takes a fifteenth of the time of eight shifts.
    bits = (torch.arange(256, device=words.device).unsqueeze(1) >> torch.arange(8, device=words.device)) & 1
    table = bits.bool() if dtype == torch.bool else -bits.to(dtype)
    return table.index_select(0, octets.int()).view(len(words), WORD_BITS * words.shape[1])


def _decode_mask(packed: PackedMatrix) -> Tensor:
    """Return the mask as booleans (rows, columns), after checking that offsets and values fit it."""
    mask, offsets, columns = packed.mask, packed.offsets, packed.columns
    if mask.dtype != torch.int32 or mask.ndim != 2 or mask.shape[1] != _word_count(columns):
        raise ValueError(f"its mask is not int32 of {_word_count(columns)} words a row")
    is_kept = from_words(mask)
    if is_kept[:, columns:].any():
        raise ValueError("its mask has bits past the last column")
    is_kept = is_kept[:, :columns]
    expected = offsets.new_zeros(len(is_kept) + 1)
    expected[1:] = _row_counts(is_kept).cumsum(0)
    if not torch.equal(offsets, expected) or packed.values.shape != (int(expected[-1]),):
        raise ValueError("its mask, offsets and values do not fit together")
    return is_kept


def _bits(weight: Tensor) -> Tensor:
    return weight.view(BIT_DTYPES[weight.element_size()])


def _row_counts(is_kept: Tensor) -> Tensor:
    """Count the kept weights of each row in int32; torch's default, int64, takes fifty times as long."""
    return is_kept.sum(dim=1, dtype=torch.int32)


def _word_count(columns: int) -> int:
    return -(-columns // WORD_BITS)


def _offset_dtype(kept: int) -> torch.dtype:
    return torch.int32 if kept < 2**31 else torch.int64
