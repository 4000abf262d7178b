"""Triton kernels that read the packed format directly; imported only if triton is installed and needed.

Every element of a tile is an octet: 8 columns of one row, which are 8 bits of the mask. The position of its first value
is the row's offset, plus the row's entry in `starts` (see `triton_backend.py`), plus the number of set mask bits
between that entry's column and the octet. The values of an octet are contiguous, so that a thread reads them with a
pointer that advances by one at every set bit. The 32 threads of a warp have 32 neighbouring octets of a row: at 70 %
zeros their values are about 150 neighbouring bytes. Threads hold several rows, whose loads are independent.

The placement of `tl.where` and `tl.load`, and the doubled mask bits, let LLVM and ptxas generate the fewest
instructions for a bit: an `and` with a predicate, a load, and a 64-bit sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_bits(word):
    """Count the set bits of each uint32; LLVM recognises the pattern and compiles it to one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def fetch(mask, starts, row, octet, words, segments):
    """Load the two mask words around each octet (rows, octets), and the position of their first value in the row."""
    segment = octet // 8
    is_kept = (2 * segment < words)[None, :]
    start = tl.load(starts + row[:, None] * segments + segment[None, :], mask=is_kept, other=0).to(tl.int32)
    first = mask + row[:, None] * words + (2 * segment)[None, :]
    low = tl.load(first, mask=is_kept, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(first + 1, mask=(2 * segment + 1 < words)[None, :], other=0).to(tl.uint32, bitcast=True)
    return start, low, high


@triton.jit
def locate(start, low, high, octet):
    """Return the mask bits of octets, and the position of their first value in the row."""
    lower = (octet % 8 < 4)[None, :]
    shift = (8 * (octet % 4)).to(tl.uint32)[None, :]
    below = (tl.full((1, 1), 1, tl.uint32) << shift) - 1
    before = count_bits(low & tl.where(lower, below, 0xFFFFFFFF)) + count_bits(high & tl.where(lower, 0, below))
    return (tl.where(lower, low, high) >> shift) & 255, start + before.to(tl.int32)


# Sizes that do not make the code faster are not specialised, which avoids compiling variants for them.
@triton.jit(do_not_specialize=["rows", "words", "segments"])
def multiply_one(
    mask,
    values,
    offsets,
    starts,
    x,
    bias,
    out,
    rows,
    columns,
    words,
    segments,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Compute out (tokens, rows) = x (tokens, columns) W^T + bias, with one token per program."""
    token = tl.program_id(1).to(tl.int64)
    x += token * columns
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, rows - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    lane = tl.arange(0, OCTETS)
    total = tl.zeros((ROWS, OCTETS), tl.float32)
    start, low, high = fetch(mask, starts, row, lane, words, segments)
    for step in range(tl.cdiv(columns, 8 * OCTETS)):
        octet = step * OCTETS + lane
        bits, position = locate(start, low, high, octet)
        # The words of the next step are loaded while the values of this step are read.
        start, low, high = fetch(mask, starts, row, octet + OCTETS, words, segments)
        # Each bit is doubled: LLVM would compile the test of one bit to a shift, but not the test of two.
        bits = bits * 0x101
        value = begin + position
        for bit in tl.static_range(8):
            is_kept = (bits & (0x101 << bit)) != 0
            weight = tl.load(value, mask=is_kept).to(tl.float32)
            # Past the last column no bit is set, so that the value read there is not used.
            other = tl.load(x + tl.minimum(8 * octet + bit, columns - 1)).to(tl.float32)
            total = tl.where(is_kept, total + weight * other[None, :], total)
            value = tl.where(is_kept, value + 1, value)
    sums = tl.sum(total, axis=1)
    if BIASED:
        sums += tl.load(bias + row).to(tl.float32)
    tl.store(out + token * rows + out_row, sums.to(out.dtype.element_ty), mask=out_row < rows)


@triton.jit
def load_bit(begin, position, bits, bit: tl.constexpr):
    """Return the weights at one bit of every octet, zeros included, and the positions of the next values."""
    is_kept = bits & (1 << bit)
    return tl.load(begin + position, mask=is_kept != 0, other=0), position + (is_kept >> bit).to(tl.int32)


@triton.jit
def expand(begin, position, bits, ROWS: tl.constexpr, OCTETS: tl.constexpr):
    """Return the dense tile (rows, 8 * octets), in which each thread holds 8 neighbours and stores them at once."""
    zeroth, position = load_bit(begin, position, bits, 0)
    first, position = load_bit(begin, position, bits, 1)
    second, position = load_bit(begin, position, bits, 2)
    third, position = load_bit(begin, position, bits, 3)
    fourth, position = load_bit(begin, position, bits, 4)
    fifth, position = load_bit(begin, position, bits, 5)
    sixth, position = load_bit(begin, position, bits, 6)
    seventh, position = load_bit(begin, position, bits, 7)
    # Every join adds a new last dimension, so that the first join becomes the slowest dimension.
    even = tl.join(tl.join(zeroth, fourth), tl.join(second, sixth))
    odd = tl.join(tl.join(first, fifth), tl.join(third, seventh))
    return tl.reshape(tl.join(even, odd), (ROWS, 8 * OCTETS))


@triton.jit(do_not_specialize=["rows", "words", "segments", "tokens"])
def multiply_few(
    mask,
    values,
    offsets,
    starts,
    x,
    bias,
    out,
    rows,
    columns,
    words,
    segments,
    tokens,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Compute out (tokens, rows) = x (tokens, columns) W^T + bias for up to TOKENS tokens, with tensor cores.

    Each dense tile is expanded once for all tokens.
    """
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, rows - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    lane = tl.arange(0, OCTETS)
    token = tl.arange(0, TOKENS)
    is_token = (token < tokens)[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.cdiv(columns, 8 * OCTETS)):
        octet = step * OCTETS + lane
        start, low, high = fetch(mask, starts, row, octet, words, segments)
        bits, position = locate(start, low, high, octet)
        tile = expand(begin, position, bits, ROWS, OCTETS)
        column = step * (8 * OCTETS) + tl.arange(0, 8 * OCTETS)
        other = tl.load(
            x + token[:, None] * columns + column[None, :], mask=is_token & (column < columns)[None, :], other=0
        )
        total = tl.dot(other, tl.trans(tile), total)
    if BIASED:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    targets = out + token[:, None] * rows + out_row[None, :]
    tl.store(targets, total.to(out.dtype.element_ty), mask=is_token & (out_row < rows)[None, :])


@triton.jit(do_not_specialize=["first", "last", "words", "segments"])
def unpack(
    mask,
    values,
    offsets,
    starts,
    out,
    first,
    last,
    columns,
    words,
    segments,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """Write rows `first` to `last` into out (rows, columns) without conversion, equal to the bit."""
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(first + out_row, last - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)
    start, low, high = fetch(mask, starts, row, octet, words, segments)
    bits, position = locate(start, low, high, octet)
    tile = expand(begin, position, bits, ROWS, OCTETS)
    column = tl.program_id(1) * (8 * OCTETS) + tl.arange(0, 8 * OCTETS)
    targets = out + out_row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(targets, tile, mask=(first + out_row < last)[:, None] & (column < columns)[None, :])
