"""Preconditioned conjugate gradients on a fixed support: the best weights for the entries that stay.

legend  X  weights being refined, zero off the support     (out, in)
        H  Hessian, positive definite                      (in, in)
        C  right-hand side; W H for the plain target       (out, in)
        M  support, True = kept                            (out, in)
        R  residual (C - X H) on the support               (out, in)
        P  search direction                                (out, in)
ALPS (arXiv 2406.07831), Algorithm 2, solves min_X 1/2 tr(X H X^T) - tr(C X^T) with X = 0 off M. Rows are
independent problems; each has its own step size. The preconditioner is Diag(H).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RefitResult:
    """Weights (out, in), steps taken, and the largest relative masked residual over the rows."""

    weight: Tensor
    steps: int
    residual: float


def refit(H: Tensor, C: Tensor, M: Tensor, start: Tensor, max_steps: int, tolerance: float) -> RefitResult:
    """Minimise the layer objective over the entries of the support.

    Every step lowers the objective of every row, whatever the starting point.

    Args:
        H: Hessian, shape (in, in).
        C: right-hand side, shape (out, in).
        M: support, shape (out, in), boolean.
        start: weights to begin with, shape (out, in); entries off the support are dropped.
        max_steps: at most so many products with H, after the first.
        tolerance: stop once every row's masked residual is below this fraction of its masked right-hand side.
    """
    X = torch.where(M, start, 0.0)
    inverse_diagonal = H.diagonal().reciprocal()
    R = (C - X @ H).mul_(M)
    scale = (C * M).norm(dim=1).clamp_min(torch.finfo(C.dtype).tiny)
    Z = R * inverse_diagonal
    P = Z.clone()
    rz = (R * Z).sum(dim=1)
    steps, residual = 0, float((R.norm(dim=1) / scale).max())
    while steps < max_steps and residual > tolerance:
        HP = (P @ H).mul_(M)
        # A finished row has R = P = 0: its step is 0 / 0, to be read as 0.
        alpha = _ratio(rz, (P * HP).sum(dim=1))
        X.addcmul_(alpha[:, None], P)
        R.addcmul_(-alpha[:, None], HP)
        torch.mul(R, inverse_diagonal, out=Z)
        rz_next = (R * Z).sum(dim=1)
        P.mul_(_ratio(rz_next, rz)[:, None]).add_(Z)
        rz = rz_next
        steps, residual = steps + 1, float((R.norm(dim=1) / scale).max())
    return RefitResult(X, steps, residual)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
