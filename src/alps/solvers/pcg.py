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

from alps.solvers.reductions import row_inner
from alps.solvers.row_parallel import Rows, agreed
from alps.solvers.topk import apply_mask


@dataclass
class RefitResult:
    """What conjugate gradients found.

    Attributes:
        weight: X, shape (out, in).
        steps: steps taken.
        residual: largest relative masked residual over the rows.
        gain: by how much the steps lowered ||X - W||_H^2, summed over the rows.
    """

    weight: Tensor
    steps: int
    residual: float
    gain: float


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
    X = apply_mask(start, M)
    right = apply_mask(C, M).norm(dim=1)
    return pcg_iterations(H, torch.addmm(C, X, H, alpha=-1), M, X, right, max_steps, tolerance)


def pcg_iterations(
    H: Tensor,
    R: Tensor,
    M: Tensor,
    X: Tensor,
    right: Tensor,
    max_steps: int,
    tolerance: float,
    least_gain: float = 0.0,
    rows: Rows | None = None,
) -> RefitResult:
    """The steps of `refit`, from a residual that is known already.

    Args:
        H: Hessian, shape (in, in).
        R: C - X H, shape (out, in); overwritten.
        M: support, shape (out, in), boolean.
        X: weights to begin with, zero off the support, shape (out, in); overwritten with the answer.
        right: norm of every row's masked right-hand side, shape (out,).
        max_steps, tolerance: see `refit`.
        least_gain: stop after a step that lowers ||X - W||_H^2, summed over the rows, by no more than this.
        rows: the processes that refine other rows of the same matrix, and take as many steps.
    """
    kept = M.view(torch.uint8).to(X.dtype)
    inverse_diagonal = H.diagonal().reciprocal()
    right = right.clamp_min(torch.finfo(X.dtype).tiny)
    R.mul_(kept)
    P = R * inverse_diagonal
    rz = row_inner(R, P)
    buffer = torch.empty_like(R)
    steps, gain, last = 0, 0.0, float("inf")
    residual, _ = agreed(_worst(R, right), 0.0, rows, R.device)
    while steps < max_steps and residual > tolerance and last > least_gain:
        HP = torch.mm(P, H, out=buffer).mul_(kept)
        # A finished row has R = P = 0: its step is 0 / 0, to be read as 0.
        alpha = _ratio(rz, row_inner(P, HP))
        X.addcmul_(alpha[:, None], P)
        R.addcmul_(-alpha[:, None], HP)
        mine = float((alpha * rz).sum(dtype=torch.float64))
        Z = torch.mul(R, inverse_diagonal, out=buffer)
        rz_next = row_inner(R, Z)
        P.mul_(_ratio(rz_next, rz)[:, None]).add_(Z)
        rz = rz_next
        residual, last = agreed(_worst(R, right), mine, rows, R.device)
        steps, gain = steps + 1, gain + mine
    return RefitResult(X, steps, residual, gain)


def _worst(R: Tensor, right: Tensor) -> float:
    return float((R.norm(dim=1) / right).max()) if len(R) else 0.0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
