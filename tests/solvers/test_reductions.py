"""Inner products in pieces, against the whole in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.solvers.reductions import column_squares, inner, row_inner, rows_per_chunk
from helpers.problems import normal

# One row, rows that end within a piece, rows that fill two pieces and a bit, and rows longer than a piece.
SHAPES = [(1, 1), (5, 7), (1753, 300), (3, 300_000)]


def integers(seed: int, *shape: int) -> Tensor:
    """Small whole numbers: all their sums are exact in float32, so equality may be asked for."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_pieces_are_of_whole_rows() -> None:
    assert [rows_per_chunk(torch.empty(shape)) for shape in SHAPES] == [2**18, 2**18 // 7, 873, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_whole_numbers_are_exact(shape: tuple[int, int]) -> None:
    A, B = integers(1, *shape), integers(2, *shape)
    a, b = A.double(), B.double()
    assert torch.equal(row_inner(A, B).double(), (a * b).sum(dim=1))
    assert inner(A, B) == float((a * b).sum())
    assert torch.equal(column_squares(A).double(), a.square().sum(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_stays_that_of_float32(shape: tuple[int, int]) -> None:
    A, B = normal(3, *shape), normal(4, *shape)
    a, b = A.double(), B.double()
    size = float((a * b).abs().sum())
    assert inner(A, B) == pytest.approx(float((a * b).sum()), abs=1e-6 * size)
    torch.testing.assert_close(column_squares(A).double(), a.square().sum(dim=0), rtol=1e-5, atol=0)


def test_rows_add_up_in_float64() -> None:
    """Three times 2^24 - 1 is odd and beyond 2^24: float32 does not know it."""
    A = torch.zeros(3, 4)
    A[:, 1] = 2**24 - 1
    assert inner(A, torch.ones(3, 4)) == 3 * (2**24 - 1)
