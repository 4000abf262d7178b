"""The codec for one matrix: one bit a weight that says whether it is there, and the weights that are.

A weight counts as zero when all its bits are zero, so that -0.0 and every NaN come back as they were.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32  # columns in a word of the mask
# Integers that carry the bits of a dtype, by its bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A matrix is packed when that saves at least 5 %; below, reading it back is not worth the trouble.
_WORTH = 0.95


@dataclass(frozen=True)
class Packed:
    """A matrix without its zeros.

    Attributes:
        mask: int32 (rows, words); bit j of word w of a row is column 32 w + j, and bits past the last column are 0.
        values: the kept weights, row by row in the order of the columns, in their own dtype; no gaps between rows.
        offsets: int32, or int64 above 2**31 - 1 weights, (rows + 1): row i is `values[offsets[i] : offsets[i + 1]]`.
        columns: of the matrix.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.mask.nbytes + self.values.nbytes + self.offsets.nbytes


def pack(weight: Tensor) -> Packed:
    """Pack a matrix (rows, columns) with at least one column, of elements of 1, 2, 4 or 8 bytes."""
    columns = weight.shape[1]
    there = _bits(weight) != 0
    values = _bits(weight)[there].view(weight.dtype)
    offsets = there.new_zeros(len(weight) + 1, dtype=_offset_dtype(len(values)))
    offsets[1:] = _counts(there).cumsum(0)
    return Packed(_to_words(there), values, offsets, columns)


def unpack(packed: Packed) -> Tensor:
    """The matrix that was packed, to the bit.

    Raises:
        ValueError: when mask, values and offsets contradict each other.
    """
    there = _checked(packed)
    bits = torch.zeros(there.shape, dtype=BITS[packed.values.element_size()])
    return bits.masked_scatter_(there, _bits(packed.values)).view(packed.values.dtype)


def check(packed: Packed) -> None:
    """Make sure that a matrix is one.

    Raises:
        ValueError: when mask, values and offsets contradict each other.
    """
    _checked(packed)


def kept_weights(weight: Tensor) -> int:
    """Number of weights that have any bit set."""
    return int(torch.count_nonzero(_bits(weight)))


def packed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Bytes of a packed matrix with `kept` weights of `itemsize` bytes."""
    return 4 * rows * _words(columns) + kept * itemsize + _offset_dtype(kept).itemsize * (rows + 1)


def pays(rows: int, columns: int, kept: int, itemsize: int) -> bool:
    """Whether a matrix becomes at least 5 % smaller: above about 11 % zeros in bfloat16, 8 % in float32."""
    return packed_bytes(rows, columns, kept, itemsize) < _WORTH * rows * columns * itemsize


def offsets_from_mask(mask: Tensor, kept: int) -> Tensor:
    """The offsets that belong to a mask (rows, words) of `kept` weights."""
    offsets = mask.new_zeros(len(mask) + 1, dtype=_offset_dtype(kept))
    offsets[1:] = _counts(_from_words(mask)).cumsum(0)
    return offsets


def check_layout(packed: Packed, bias: Tensor | None, dtypes: Collection[torch.dtype]) -> None:
    """Refuse tensors that a kernel could not read as a packed matrix; what they hold is not looked at.

    Args:
        packed: the matrix.
        bias: (rows) in the dtype of the values, or None.
        dtypes: that the values may have.

    Raises:
        ValueError: for other shapes or dtypes, tensors on several devices, or such as are not contiguous.
    """
    mask, values, offsets = packed.mask, packed.values, packed.offsets
    rows = len(mask)
    shapes = mask.shape == (rows, _words(packed.columns)), offsets.shape == (rows + 1,), values.ndim == 1
    types = mask.dtype == torch.int32, offsets.dtype in (torch.int32, torch.int64), values.dtype in dtypes
    tensors = [tensor for tensor in (mask, values, offsets, bias) if tensor is not None]
    if not all((*shapes, *types, *(t.is_contiguous() and t.device == values.device for t in tensors))):
        raise ValueError("mask, values and offsets are not those of a packed matrix on one device")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != values.dtype):
        raise ValueError("the bias has another length or dtype than the matrix")


def _checked(packed: Packed) -> Tensor:
    """Booleans (rows, columns), or a ValueError."""
    mask, offsets, columns = packed.mask, packed.offsets, packed.columns
    if mask.dtype != torch.int32 or mask.ndim != 2 or mask.shape[1] != _words(columns):
        raise ValueError(f"its mask is not int32 of {_words(columns)} words a row")
    there = _from_words(mask)
    if there[:, columns:].any():
        raise ValueError("its mask has bits past the last column")
    there = there[:, :columns]
    counted = offsets.new_zeros(len(there) + 1)
    counted[1:] = _counts(there).cumsum(0)
    if not torch.equal(offsets, counted) or packed.values.shape != (int(counted[-1]),):
        raise ValueError("its mask, offsets and values do not fit together")
    return there


def _bits(weight: Tensor) -> Tensor:
    return weight.view(BITS[weight.element_size()])


def _counts(there: Tensor) -> Tensor:
    """Weights of each row. Summed in 64 bits, as torch would, it takes fifty times as long."""
    return there.sum(dim=1, dtype=torch.int32)


def _words(columns: int) -> int:
    return -(-columns // WORD)


def _offset_dtype(kept: int) -> torch.dtype:
    return torch.int32 if kept < 2**31 else torch.int64


def _to_words(there: Tensor) -> Tensor:
    """Booleans (rows, columns) as int32 words (rows, words)."""
    rows, columns = there.shape
    padded = there.new_zeros(rows, WORD * _words(columns))
    padded[:, :columns] = there
    eights = padded.view(torch.uint8).view(rows, 4 * _words(columns), 8)
    octets = torch.zeros(eights.shape[:2], dtype=torch.uint8)
    for bit in range(8):
        octets |= eights[:, :, bit] << bit
    return octets.view(torch.int32)


def _from_words(mask: Tensor) -> Tensor:
    """Booleans (rows, 32 words) of int32 words (rows, words)."""
    octets = mask.contiguous().view(torch.uint8)
    eights = torch.empty(*octets.shape, 8, dtype=torch.bool)
    for bit in range(8):
        eights[:, :, bit] = (octets >> bit) & 1
    return eights.view(len(mask), WORD * mask.shape[1])
