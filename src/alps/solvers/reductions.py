"""Inner products of large matrices, computed in chunks of rows so that no temporary of their size is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from alps.solvers.topk import chunk_size


def rows_per_chunk(matrix: Tensor) -> int:
    """Return the number of rows of a matrix to handle at a time."""
    return max(chunk_size(matrix) // matrix.shape[1], 1)


def row_inner(A: Tensor, B: Tensor) -> Tensor:
    """Return the inner product of every row of A with that of B, shape (rows,); sums are in their dtype."""
    size = rows_per_chunk(A)
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(torch.split(A, size), torch.split(B, size), strict=True)])


def inner(A: Tensor, B: Tensor) -> float:
    """Return the inner product of two matrices; rows are summed in their dtype, the sums of rows in float64."""
    return float(row_inner(A, B).sum(dtype=torch.float64))


def column_squares(A: Tensor) -> Tensor:
    """Return the sum of squares of every column of A (rows, columns), shape (columns,)."""
    return torch.stack([a.square().sum(dim=0) for a in torch.split(A, rows_per_chunk(A))]).sum(dim=0)
