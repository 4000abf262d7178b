"""Tests of inner products in chunks against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.solvers.reductions import column_squares, inner, row_inner, rows_per_chunk
from helpers.problems import normal

# One row, rows that end within a chunk, rows that fill two chunks and a part, and rows longer than a chunk.
SHAPES = [(1, 1), (5, 7), (1753, 300), (3, 300_000)]


def integers(seed: int, *shape: int) -> Tensor:
    """Make small whole numbers, whose sums are exact in float32."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_chunks_consist_of_whole_rows() -> None:
    assert [rows_per_chunk(torch.empty(shape)) for shape in SHAPES] == [2**18, 2**18 // 7, 873, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_whole_numbers_are_exact(shape: tuple[int, int]) -> None:
    A, B = integers(1, *shape), integers(2, *shape)
    a, b = A.double(), B.double()
    assert torch.equal(row_inner(A, B).double(), (a * b).sum(dim=1))
    assert inner(A, B) == float((a * b).sum())
    assert torch.equal(column_squares(A).double(), a.square().sum(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_accurate_to_float32_rounding(shape: tuple[int, int]) -> None:
    A, B = normal(3, *shape), normal(4, *shape)
    a, b = A.double(), B.double()
    size = float((a * b).abs().sum())
    assert inner(A, B) == pytest.approx(float((a * b).sum()), abs=1e-6 * size)
    torch.testing.assert_close(column_squares(A).double(), a.square().sum(dim=0), rtol=1e-5, atol=0)


def test_sums_of_rows_are_added_in_float64() -> None:
    """Use three times 2^24 - 1, which float32 cannot represent."""
    A = torch.zeros(3, 4)
    A[:, 1] = 2**24 - 1
    assert inner(A, torch.ones(3, 4)) == 3 * (2**24 - 1)
