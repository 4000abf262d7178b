"""The kernels for GPUs, on the packed format as it is; imported only where triton is installed and needed.

Every element of a tile is an octet: 8 columns of one row, 8 bits of the mask. Where its values begin is the row's
offset, plus the row's entry in `starts` (see `triton_backend.py`), plus the bits of the mask between the two. From
there on they follow each other, so that a thread walks its octet with a pointer that moves on by one at every bit
that is set. The 32 threads of a warp have 32 neighbouring octets of a row: at 70 % zeros their values are some 150
neighbouring bytes. Threads hold several rows, whose loads do not depend on each other.

`tl.where` and `tl.load` in the places where they are, and the mask doubled, are what LLVM and ptxas turn into the
fewest instructions for a bit: `and` with a predicate, a load, and a 64-bit sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_bits(word):
    """Bits that are set in each uint32; LLVM knows the pattern and makes one instruction of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def fetch(mask, starts, row, octet, words, segments):
    """The two words of the mask around octets (rows, octets), and where the values of the first one begin."""
    segment = octet // 8
    there = (2 * segment < words)[None, :]
    start = tl.load(starts + row[:, None] * segments + segment[None, :], mask=there, other=0).to(tl.int32)
    first = mask + row[:, None] * words + (2 * segment)[None, :]
    low = tl.load(first, mask=there, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(first + 1, mask=(2 * segment + 1 < words)[None, :], other=0).to(tl.uint32, bitcast=True)
    return start, low, high


@triton.jit
def locate(start, low, high, octet):
    """The bits of octets, and the place of their first value within the row."""
    lower = (octet % 8 < 4)[None, :]
    shift = (8 * (octet % 4)).to(tl.uint32)[None, :]
    below = (tl.full((1, 1), 1, tl.uint32) << shift) - 1
    before = count_bits(low & tl.where(lower, below, 0xFFFFFFFF)) + count_bits(high & tl.where(lower, 0, below))
    return (tl.where(lower, low, high) >> shift) & 255, start + before.to(tl.int32)


# No kernel is compiled anew for numbers that it does not gain by.
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
    """out (tokens, rows) = x (tokens, columns) W^T + bias, one token a program."""
    token = tl.program_id(1).to(tl.int64)
    x += token * columns
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(here, rows - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    lane = tl.arange(0, OCTETS)
    total = tl.zeros((ROWS, OCTETS), tl.float32)
    start, low, high = fetch(mask, starts, row, lane, words, segments)
    for step in range(tl.cdiv(columns, 8 * OCTETS)):
        octet = step * OCTETS + lane
        bits, place = locate(start, low, high, octet)
        # Words of the next step are on their way while this one's values are read.
        start, low, high = fetch(mask, starts, row, octet + OCTETS, words, segments)
        # Each bit twice: for a test of one bit LLVM would shift, for this it does not.
        bits = bits * 0x101
        value = begin + place
        for bit in tl.static_range(8):
            there = (bits & (0x101 << bit)) != 0
            weight = tl.load(value, mask=there).to(tl.float32)
            # Past the last column no bit is set, and what is read does not count.
            other = tl.load(x + tl.minimum(8 * octet + bit, columns - 1)).to(tl.float32)
            total = tl.where(there, total + weight * other[None, :], total)
            value = tl.where(there, value + 1, value)
    found = tl.sum(total, axis=1)
    if BIASED:
        found += tl.load(bias + row).to(tl.float32)
    tl.store(out + token * rows + here, found.to(out.dtype.element_ty), mask=here < rows)


@triton.jit
def take(begin, place, bits, bit: tl.constexpr):
    """The weights at one bit of every octet, zeros included, and where the next ones are."""
    there = bits & (1 << bit)
    return tl.load(begin + place, mask=there != 0, other=0), place + (there >> bit).to(tl.int32)


@triton.jit
def expand(begin, place, bits, ROWS: tl.constexpr, OCTETS: tl.constexpr):
    """The dense tile (rows, 8 octets): every thread has its 8 neighbours together, and stores them at once."""
    zeroth, place = take(begin, place, bits, 0)
    first, place = take(begin, place, bits, 1)
    second, place = take(begin, place, bits, 2)
    third, place = take(begin, place, bits, 3)
    fourth, place = take(begin, place, bits, 4)
    fifth, place = take(begin, place, bits, 5)
    sixth, place = take(begin, place, bits, 6)
    seventh, place = take(begin, place, bits, 7)
    # A new last dimension with every join: the first one becomes the slowest.
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
    """The same for up to TOKENS tokens at once: dense tiles for the tensor cores, one expansion for all of them."""
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(here, rows - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    lane = tl.arange(0, OCTETS)
    token = tl.arange(0, TOKENS)
    wanted = (token < tokens)[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.cdiv(columns, 8 * OCTETS)):
        octet = step * OCTETS + lane
        start, low, high = fetch(mask, starts, row, octet, words, segments)
        bits, place = locate(start, low, high, octet)
        tile = expand(begin, place, bits, ROWS, OCTETS)
        column = step * (8 * OCTETS) + tl.arange(0, 8 * OCTETS)
        other = tl.load(
            x + token[:, None] * columns + column[None, :], mask=wanted & (column < columns)[None, :], other=0
        )
        total = tl.dot(other, tl.trans(tile), total)
    if BIASED:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    places = out + token[:, None] * rows + here[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=wanted & (here < rows)[None, :])


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
    """Rows `first` to `last` into out (rows, columns), to the bit: nothing is converted."""
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(first + here, last - 1).to(tl.int64)
    begin = (values + tl.load(offsets + row))[:, None]
    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)
    start, low, high = fetch(mask, starts, row, octet, words, segments)
    bits, place = locate(start, low, high, octet)
    tile = expand(begin, place, bits, ROWS, OCTETS)
    column = tl.program_id(1) * (8 * OCTETS) + tl.arange(0, 8 * OCTETS)
    places = out + here.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(places, tile, mask=(first + here < last)[:, None] & (column < columns)[None, :])
