"""How much a site loses at every sparsity, predicted without pruning it.

legend  W    dense weight                                               (out, in)
        H    damped Gram of its inputs, X^T X + lam I                   (in, in)
        s    cost of removing one weight, the others then corrected     (out, in)
Optimal brain surgery (Hassibi, Stork 1992): s_ij = W_ij^2 / [H^{-1}]_jj. The sum of the smallest scores is what
pruning costs as long as removals do not interact; on real sites it is within a fifth of ALPS's error from 50 to 85 %
(docs/allocation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers.hessian import damped

# Sparsities at which a curve is kept; between them it is a straight line.
POINTS = 201


@dataclass(frozen=True)
class ErrorCurve:
    """Predicted relative reconstruction error of one site over sparsity.

    Attributes:
        entries: weights of the site.
        errors: at `POINTS` sparsities from 0 to 1, evenly spaced; float64, never falling, and convex
            up to the rounding of counts; on the CPU.
    """

    entries: int
    errors: Tensor


def removal_costs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """W_ij^2 / [H^{-1}]_jj, shape (out, in)."""
    return weight.square() / inverse_diagonal


def inverse_diagonal(stats: InputStats, fraction: float) -> Tensor:
    """Diagonal of H^{-1}, shape (in,), float32, computed in float64; `fraction` of the mean diagonal damps."""
    hessian, _ = damped(stats, fraction)
    factor = torch.linalg.cholesky(hessian.double())
    return torch.cholesky_inverse(factor).diagonal().float()


def error_curve(weight: Tensor, costs: Tensor, stats: InputStats) -> ErrorCurve:
    """The curve of one site.

    Args:
        weight: dense weight, shape (out, in), float32.
        costs: its `removal_costs`.
        stats: sums of its inputs, with a Gram.
    """
    ordered = costs.flatten().sort().values.to(torch.float64).cumsum(0)
    counts = torch.linspace(0, 1, POINTS, dtype=torch.float64, device=weight.device) * weight.numel()
    at = torch.cat([ordered.new_zeros(1), ordered])[counts.round().long()]
    reference = stats.energy(weight)
    return ErrorCurve(weight.numel(), (at / reference if reference > 0 else at * 0).cpu())
