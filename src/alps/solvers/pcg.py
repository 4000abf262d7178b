"""Preconditioned conjugate gradients: optimal weights on a fixed support.

legend  X  weights being refined, zero off the support     (out, in)
        H  Hessian, positive definite                      (in, in)
        C  right-hand side; W H for the plain target       (out, in)
        M  support, True = kept                            (out, in)
        R  residual (C - X H) on the support               (out, in)
        P  search direction                                (out, in)
ALPS (arXiv 2406.07831), Algorithm 2, solves min_X 1/2 tr(X H X^T) - tr(C X^T) with X = 0 off M. Rows are
independent problems, and each has its own step size. The preconditioner is Diag(H).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.solvers.hessian import row_inner
from alps.solvers.row_parallel import all_reduce_max_and_sum
from alps.solvers.topk import apply_mask


@dataclass
class RefitResult:
    """Result of conjugate gradients.

    Attributes:
        weight: X, shape (out, in).
        steps: steps taken.
        residual: largest relative masked residual over the rows.
        gain: decrease of ||X - W||_H^2 by the steps, summed over the rows.
    """

    weight: Tensor
    steps: int
    residual: float
    gain: float


def refit(H: Tensor, C: Tensor, M: Tensor, start: Tensor, *, max_steps: int, tolerance: float) -> RefitResult:
    """Minimise the layer objective over the entries of the support.

    Every step lowers the objective of every row, from any starting point.

    Args:
        H: Hessian, shape (in, in).
        C: right-hand side, shape (out, in).
        M: support, shape (out, in), boolean.
        start: initial weights, shape (out, in); entries off the support are dropped.
        max_steps: largest number of steps, each with one product with H.
        tolerance: stop when every row's masked residual is below this fraction of its masked right-hand side.
    """
    X = apply_mask(start, M)
    rhs_norm = apply_mask(C, M).norm(dim=1)
    R = torch.addmm(C, X, H, alpha=-1)
    return pcg_iterations(H, R, M, X, rhs_norm=rhs_norm, max_steps=max_steps, tolerance=tolerance)


def pcg_iterations(
    H: Tensor,
    R: Tensor,
    M: Tensor,
    X: Tensor,
    *,
    rhs_norm: Tensor,
    max_steps: int,
    tolerance: float,
    min_gain: float = 0.0,
    group: ProcessGroup = SINGLE_PROCESS,
) -> RefitResult:
    """Run the iterations of `refit` from a given residual.

    Args:
        H: Hessian, shape (in, in).
        R: C - X H, shape (out, in); overwritten.
        M: support, shape (out, in), boolean.
        X: initial weights, zero off the support, shape (out, in); overwritten with the result.
        rhs_norm: norm of every row's masked right-hand side, shape (out,).
        max_steps: largest number of steps, each with one product with H.
        tolerance: stop when every row's masked residual is below this fraction of its masked right-hand side.
        min_gain: stop after a step that lowers ||X - W||_H^2, summed over the rows, by no more than this.
        group: ranks that refit other rows of the same matrix; all take the same number of steps.
    """
    kept = M.view(torch.uint8).to(X.dtype)
    inverse_diagonal = H.diagonal().reciprocal()
    rhs_norm = rhs_norm.clamp_min(torch.finfo(X.dtype).tiny)
    R.mul_(kept)
    P = R * inverse_diagonal
    rz = row_inner(R, P)
    buffer = torch.empty_like(R)
    steps, gain, last = 0, 0.0, float("inf")
    residual, _ = all_reduce_max_and_sum(_largest_residual(R, rhs_norm), 0.0, group, R.device)
    while steps < max_steps and residual > tolerance and last > min_gain:
        HP = torch.mm(P, H, out=buffer).mul_(kept)
        # A finished row has R = P = 0, so that its step is 0 / 0, which `_ratio` replaces by 0.
        alpha = _ratio(rz, row_inner(P, HP))
        X.addcmul_(alpha[:, None], P)
        R.addcmul_(-alpha[:, None], HP)
        step_gain = float((alpha * rz).sum(dtype=torch.float64))
        Z = torch.mul(R, inverse_diagonal, out=buffer)
        rz_next = row_inner(R, Z)
        P.mul_(_ratio(rz_next, rz)[:, None]).add_(Z)
        rz = rz_next
        residual, last = all_reduce_max_and_sum(_largest_residual(R, rhs_norm), step_gain, group, R.device)
        steps, gain = steps + 1, gain + step_gain
    return RefitResult(X, steps, residual, gain)


def _largest_residual(R: Tensor, rhs_norm: Tensor) -> float:
    return float((R.norm(dim=1) / rhs_norm).max()) if len(R) else 0.0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide elementwise; 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
