"""Inner products of large matrices, in pieces: nothing of the matrices' size is held in between."""

from __future__ import annotations

import torch
from torch import Tensor

from alps.solvers.topk import chunk_of


def rows_of(matrix: Tensor) -> int:
    """How many rows of a matrix to handle at a time."""
    return max(chunk_of(matrix) // matrix.shape[1], 1)


def row_inner(A: Tensor, B: Tensor) -> Tensor:
    """Inner product of every row of A with that of B, both (rows, columns); summed in their dtype, shape (rows,)."""
    size = rows_of(A)
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(torch.split(A, size), torch.split(B, size), strict=True)])


def inner(A: Tensor, B: Tensor) -> float:
    """Inner product of two matrices; rows are summed in their dtype, and the rows' sums in float64."""
    return float(row_inner(A, B).sum(dtype=torch.float64))


def column_squares(A: Tensor) -> Tensor:
    """Sum of the squares of every column of A (rows, columns), shape (columns,)."""
    return torch.stack([a.square().sum(dim=0) for a in torch.split(A, rows_of(A))]).sum(dim=0)
