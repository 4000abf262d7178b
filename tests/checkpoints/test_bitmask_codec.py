"""The codec of one matrix: exact to the bit, against a packer that goes weight by weight, in the bytes it promises."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.checkpoints.bitmask_codec import (
    BIT_DTYPES,
    PackedMatrix,
    count_kept,
    is_worth_packing,
    pack,
    packed_bytes,
    unpack,
)
from alps.checkpoints.compression import byte_planes, compress, decompress, join_planes, raw_bytes

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def made_up(rows: int, columns: int, dtype: torch.dtype, sparsity: float, seed: int = 0) -> Tensor:
    """Random bits, so that NaNs, infinities and subnormals are among them; zeros by chance."""
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator)
    bits = octets.view(BIT_DTYPES[dtype.itemsize])
    bits[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return bits.view(dtype)


def naive(weight: Tensor) -> tuple[list[list[int]], bytes, list[int]]:
    """Mask words, bytes of the values and offsets, weight by weight from the bytes in memory."""
    size, columns = weight.element_size(), weight.shape[1]
    data = bytes(raw_bytes(weight))
    words, values, offsets = [], b"", [0]
    for row in range(len(weight)):
        line = [0] * ((columns + 31) // 32)
        for column in range(columns):
            start = (row * columns + column) * size
            if any(data[start : start + size]):
                line[column // 32] |= 1 << (column % 32)
                values += data[start : start + size]
        words.append(line)
        offsets.append(len(values) // size)
    return words, values, offsets


@settings(max_examples=40)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 0.97, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_matrix_comes_back_to_the_bit_and_is_laid_out_as_documented(
    rows: int, columns: int, dtype: torch.dtype, sparsity: float, seed: int
) -> None:
    weight = made_up(rows, columns, dtype, sparsity, seed)
    packed = pack(weight)
    words, values, offsets = naive(weight)
    unsigned = [[word & 0xFFFFFFFF for word in line] for line in packed.mask.tolist()]
    assert packed.mask.dtype == packed.offsets.dtype == torch.int32 and packed.values.dtype == dtype
    assert unsigned == words and packed.offsets.tolist() == offsets and bytes(raw_bytes(packed.values)) == values

    back = unpack(packed)
    assert back.dtype == dtype and back.shape == weight.shape and bytes(raw_bytes(back)) == bytes(raw_bytes(weight))
    assert count_kept(weight) == len(packed.values)
    assert packed.nbytes == packed_bytes(rows, columns, len(packed.values), dtype.itemsize)

    halves = [decompress(compress(plane), len(plane)) for plane in byte_planes(packed.values)]
    assert [bytes(raw_bytes(half)) for half in halves] == [values[k :: dtype.itemsize] for k in range(dtype.itemsize)]
    assert bytes(raw_bytes(join_planes(halves))) == values


def test_only_a_weight_without_any_bit_is_left_out() -> None:
    # 0.0, -0.0, the smallest subnormal, a NaN with a payload and a negative one, infinity, 1.
    patterns = [0x00000000, 0x80000000, 0x00000001, 0x7FC0BEEF, 0xFFC00001, 0x7F800000, 0x3F800000]
    weight = torch.frombuffer(bytearray(struct.pack("<7I", *patterns)), dtype=torch.float32).view(1, 7)
    packed = pack(weight)
    assert packed.mask.tolist() == [[0b1111110]] and packed.offsets.tolist() == [0, 6]
    assert struct.unpack("<7I", raw_bytes(unpack(packed))) == tuple(patterns)


def test_a_view_is_packed_as_what_it_shows() -> None:
    weight = made_up(6, 40, torch.bfloat16, 0.5)
    assert torch.equal(unpack(pack(weight.T)).view(torch.int16), weight.T.view(torch.int16))


@pytest.mark.parametrize(
    ("columns", "share"),
    [(576, 0.36597), (2048, 0.36348), (4096, 0.36299)],
)
def test_70_percent_in_bfloat16_takes_at_most_37_percent(columns: int, share: float) -> None:
    weight = torch.ones(256, columns, dtype=torch.bfloat16)
    zeros = round(0.7 * weight.numel())
    weight.view(-1)[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))[:zeros]] = 0
    packed = pack(weight)
    assert packed.nbytes == weight.numel() // 8 + 2 * (weight.numel() - zeros) + 4 * 257
    assert packed.nbytes / weight.nbytes == pytest.approx(share, abs=5e-5) and packed.nbytes <= 0.37 * weight.nbytes


def test_2_of_4_in_bfloat16_takes_its_bound_and_the_offsets() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.bfloat16).repeat(64, 512)
    assert pack(weight).nbytes == 0.5625 * weight.nbytes + 4 * 65


def test_packing_pays_from_the_documented_share_of_zeros_on() -> None:
    def least(itemsize: int) -> float:
        n = 1024 * 4096
        return next(p / 1000 for p in range(1000) if is_worth_packing(1024, 4096, n - n * p // 1000, itemsize))

    assert [least(size) for size in (1, 2, 4, 8)] == [0.176, 0.113, 0.082, 0.066]


def test_offsets_are_wide_where_they_have_to_be() -> None:
    assert packed_bytes(7, 32, 2**31 - 1, 2) == 4 * 7 + 2 * (2**31 - 1) + 4 * 8
    assert packed_bytes(7, 32, 2**31, 2) == 4 * 7 + 2 * 2**31 + 8 * 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: PackedMatrix(p.mask[:, :1], p.values, p.offsets, p.columns), "not int32 of 2 words a row"),
        (lambda p: PackedMatrix(p.mask.long(), p.values, p.offsets, p.columns), "not int32 of 2 words a row"),
        (
            lambda p: PackedMatrix(p.mask | torch.tensor([[0, 1 << 8]]).int(), p.values, p.offsets, 40),
            "past the last column",
        ),
        (lambda p: PackedMatrix(p.mask ^ torch.tensor([[1, 0]]).int(), p.values, p.offsets, p.columns), "do not fit"),
        (lambda p: PackedMatrix(p.mask, p.values[1:], p.offsets, p.columns), "do not fit"),
        (lambda p: PackedMatrix(p.mask, p.values, p.offsets + 1, p.columns), "do not fit"),
        (lambda p: PackedMatrix(p.mask, p.values, p.offsets[1:], p.columns), "do not fit"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(change: object, complaint: str) -> None:
    packed = pack(made_up(3, 40, torch.float16, 0.6))
    with pytest.raises(ValueError, match=complaint):
        unpack(change(packed))  # type: ignore[operator]
