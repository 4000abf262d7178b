"""Predicted reconstruction error of a layer at every sparsity, without pruning it.

legend  W    dense weight                                               (out, in)
        H    damped Gram of its inputs, X^T X + lam I                   (in, in)
        s    cost of removing one weight and correcting the others      (out, in)
Optimal brain surgery (Hassibi, Stork 1992): s_ij = W_ij^2 / [H^{-1}]_jj. The sum of the smallest costs is the error of
pruning as long as removals do not interact. On real layers it is within a fifth of ALPS's error from 50 to 85 %
sparsity (docs/explanation/allocation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers.hessian import damped

# Number of sparsities at which a curve is stored; it is linear between them.
POINTS = 201
# Costs that a curve is made of: those of every n-th row, since sorting all of them takes most of the time.
_MAX_COSTS = 2**18


@dataclass(frozen=True)
class ErrorCurve:
    """Predicted relative reconstruction error of one layer as a function of sparsity.

    Attributes:
        entries: number of weights of the layer.
        errors: errors at `POINTS` evenly spaced sparsities from 0 to 1, float64 on the CPU; never decreasing, and
            convex up to the rounding of counts.
    """

    entries: int
    errors: Tensor


def removal_costs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """Return the removal costs W_ij^2 / [H^{-1}]_jj, shape (out, in)."""
    return weight.square() / inverse_diagonal


def inverse_diagonal(stats: InputStats, fraction: float) -> Tensor:
    """Return the diagonal of H^{-1}, shape (in,), float32, computed in float64.

    Args:
        stats: input statistics with a Gram.
        fraction: damping as a fraction of the Gram's mean diagonal.
    """
    hessian, _ = damped(stats, fraction)
    factor = torch.linalg.cholesky(hessian.double())
    return torch.cholesky_inverse(factor).diagonal().float()


def error_curve(weight: Tensor, costs: Tensor, energy: float) -> ErrorCurve:
    """Return the error curve of one layer.

    Args:
        weight: dense weight, shape (out, in), float32.
        costs: result of `removal_costs` for the weight, shape (out, in).
        energy: of the layer's outputs, ||X W^T||^2.
    """
    sample = costs[:: -(-costs.numel() // _MAX_COSTS)].flatten()
    cumulative = sample.sort().values.to(torch.float64).cumsum(0).mul_(weight.numel() / sample.numel())
    counts = torch.linspace(0, 1, POINTS, dtype=torch.float64, device=weight.device) * sample.numel()
    errors = torch.cat([cumulative.new_zeros(1), cumulative])[counts.round().long()]
    return ErrorCurve(weight.numel(), (errors / energy if energy > 0 else errors * 0).cpu())
