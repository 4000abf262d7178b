"""DSnoT: start from another method's mask and exchange kept and pruned weights, without changing their values.

legend  W    dense weight                                                       (out, in)
        A    expected contribution of each weight, W_ij E[x_j]                  (out, in)
        eps  expected output change of a row, sum of A over pruned entries      (out,)
Zhang et al.: Dynamic Sparse No Training, ICLR 2024, arXiv 2310.08915. Growing criterion: the pruned weight that
lowers |eps| most per unit of variance, max sign(eps) A_ij / Var(x_j). Pruning criterion: among kept weights whose
removal lowers |eps| as well, the one with the smallest Wanda score |W_ij| ||X_j||; for N:M the one with the smallest
score in the group of the grown weight, of either sign. A row stops when |eps| is small, or when a swap would change the
sign of eps or raise |eps| (the authors' code lets |eps| rise under N:M).

The variance is pooled over all calibration tokens. The authors' code keeps a running mean of the variances within each
sequence, which ignores differences between the means of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution, SolveInfo, Status
from alps.solvers.hessian import inverse_factor
from alps.solvers.patterns import Pattern, SemiStructured, keep_largest


@dataclass(frozen=True)
class Moments:
    """Statistics of each input feature, and the diagonal of SparseGPT's factor.

    Attributes:
        norms: norm of each feature over the tokens, shape (in,).
        mean: mean of each feature, shape (in,).
        variance: variance of each feature, shape (in,).
        factor_diagonal: diagonal of the factor of H^{-1}, shape (in,); None unless the initial mask is SparseGPT's.
        damping: the absolute damping of the factor; 0 without it.
        notes: remarks for the user.
    """

    norms: Tensor
    mean: Tensor
    variance: Tensor
    factor_diagonal: Tensor | None
    damping: float
    notes: list[str]


@dataclass(frozen=True)
class DSnoT(Method):
    """DSnoT with the defaults of its paper.

    Attributes:
        initial: the initial mask: Wanda's, or that of SparseGPT's scores W_ij^2 / U_jj^2 of the dense weight, compared
            within each row as in the authors' code.
        max_cycles: largest number of swaps per row.
        threshold: a row stops when |eps| is below this, in units of its output.
        damping: damping for the SparseGPT scores, as a fraction of the Gram's mean diagonal.
    """

    initial: Literal["wanda", "sparsegpt"] = "wanda"
    max_cycles: int = 50
    threshold: float = 0.1
    damping: float = 0.01

    @property
    def name(self) -> str:
        return "dsnot" if self.initial == "wanda" else f"dsnot-{self.initial}"

    @property
    def needs(self) -> Needs:
        return Needs.MOMENTS if self.initial == "wanda" else Needs.GRAM

    @property
    def by_rows(self) -> bool:
        return True

    def prepare(self, stats: InputStats) -> Moments:
        diagonal, damping, notes = None, 0.0, list[str]()
        if self.initial == "sparsegpt":
            factor = inverse_factor(stats, self.damping)
            diagonal, damping, notes = factor.upper.diagonal().clone(), factor.damping, factor.notes
        # Constant inputs have zero variance. A lower bound far below real variances keeps the criterion finite.
        floor = 1e-6 * stats.square.mean() / max(stats.tokens, 1)
        variance = stats.variance().clamp_min(torch.clamp_min(floor, 1e-30))
        return Moments(stats.norms(), stats.mean(), variance, diagonal, damping, notes)

    def prune_matrix(self, weight: Tensor, state: Moments, pattern: Pattern) -> Solution:
        info = SolveInfo(Status.MAX_ITERATIONS, damping=state.damping, notes=list(state.notes))
        wanda = weight.abs() * state.norms
        scores = wanda if state.factor_diagonal is None else weight.square() / state.factor_diagonal.square()
        with info.timed("select"):
            mask = keep_largest(scores, pattern, scope="row")
        with info.timed("swap"):
            swaps = _Swaps(weight * state.mean, state.variance, wanda=wanda, mask=mask, pattern=pattern)
            for cycle in range(1, self.max_cycles + 1):
                info.iterations = cycle
                if not swaps.step(self.threshold):
                    info.status = Status.CONVERGED
                    break
        return Solution(weight, swaps.mask, info)


class _Swaps:
    """The masks and expected errors of all rows, which change by one swap at a time in every active row."""

    def __init__(self, A: Tensor, variance: Tensor, *, wanda: Tensor, mask: Tensor, pattern: Pattern) -> None:
        self.A, self.wanda, self.mask, self.pattern = A, wanda, mask.clone(), pattern.base
        self.growth = A / variance
        self.growable, self.prunable = pattern.addable(mask), mask.clone()  # a weight moves at most once
        self.eps = torch.where(mask, 0.0, A).sum(dim=1)
        self.active = torch.ones_like(self.eps, dtype=torch.bool)

    def step(self, threshold: float) -> bool:
        """Swap once in every active row, and return whether any row changed."""
        sign = self.eps.sign()
        gain = torch.where(self.growable, self.growth * sign[:, None], -torch.inf)
        best, grow = gain.max(dim=1)
        cost = self._pruning_cost(sign, grow)
        least, prune = cost.min(dim=1)
        after = self.eps + self._entry(prune) - self._entry(grow)
        self.active &= (self.eps.abs() > threshold) & (after.sign() == sign) & (after.abs() < self.eps.abs())
        self.active &= best.isfinite() & least.isfinite()
        rows = self.active.nonzero().squeeze(1)
        self.mask[rows, grow[rows]] = True
        self.mask[rows, prune[rows]] = False
        self.growable[rows, grow[rows]] = False
        self.prunable[rows, prune[rows]] = False
        self.eps[rows] = after[rows]
        return len(rows) > 0

    def _pruning_cost(self, sign: Tensor, grow: Tensor) -> Tensor:
        """Return the Wanda scores of the weights that may be pruned when `grow` is added, inf elsewhere."""
        allowed = self.prunable
        if isinstance(self.pattern, SemiStructured):
            group = torch.arange(self.A.shape[1], device=self.A.device) // self.pattern.group
            allowed = allowed & (group == (grow // self.pattern.group)[:, None])
        else:
            allowed = allowed & (self.A * sign[:, None] < 0)
        return torch.where(allowed, self.wanda, torch.inf)

    def _entry(self, column: Tensor) -> Tensor:
        """Return the entry of A at one column of each row, shape (out,)."""
        return self.A.gather(1, column[:, None]).squeeze(1)
