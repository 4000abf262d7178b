"""DSnoT: start from another method's mask and swap weights in and out, without changing their values.

legend  W    dense weight                                                       (out, in)
        A    expected contribution of each weight, W_ij E[x_j]                  (out, in)
        eps  expected output change of a row, sum of A over pruned entries      (out,)
Zhang et al.: Dynamic Sparse No Training, ICLR 2024, arXiv 2310.08915. Growing criterion: the pruned weight that
lowers |eps| most per unit of variance, max sign(eps) A_ij / Var(x_j). Pruning criterion: among kept weights whose
removal lowers |eps| as well, the one of smallest Wanda score |W_ij| ||X_j||; for N:M the weakest of the grown
weight's own group, whatever its sign. A row stops when |eps| is small, or a swap would change its sign or raise it
(the authors' code lets |eps| rise under N:M).

The variance is the pooled one over all calibration tokens. The authors' code keeps a running mean of the
variances within each sequence, which leaves out how the means of sequences differ.
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
    """Per input feature: norm, mean, variance, and the diagonal of SparseGPT's factor where asked; all (in,)."""

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
        initial: whose mask to start from: Wanda's, or the one of SparseGPT's scores W_ij^2 / U_jj^2 of the dense
            weight, row by row, as the authors do.
        max_cycles: swaps per row at most.
        threshold: a row is left alone once |eps| is below this, in units of its output.
        damping: for the SparseGPT scores, as a fraction of the Gram's mean diagonal.
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
            upper, damping, notes = inverse_factor(stats, self.damping)
            diagonal = upper.diagonal().clone()
        # Constant inputs have zero variance: a floor far below any real one keeps the criterion finite.
        floor = 1e-6 * stats.square.mean() / max(stats.tokens, 1)
        variance = stats.variance().clamp_min(torch.clamp_min(floor, 1e-30))
        return Moments(stats.norms(), stats.mean(), variance, diagonal, damping, notes)

    def _solve(self, weight: Tensor, state: Moments, pattern: Pattern) -> Solution:
        info = SolveInfo(Status.MAX_ITERATIONS, damping=state.damping, notes=list(state.notes))
        wanda = weight.abs() * state.norms
        scores = wanda if state.factor_diagonal is None else weight.square() / state.factor_diagonal.square()
        with info.timed("select"):
            mask = keep_largest(scores, pattern, scope="row")
        with info.timed("swap"):
            swaps = _Swaps(weight * state.mean, state.variance, wanda, mask, pattern)
            for cycle in range(1, self.max_cycles + 1):
                info.iterations = cycle
                if not swaps.step(self.threshold):
                    info.status = Status.CONVERGED
                    break
        return Solution(weight, swaps.mask, info)


class _Swaps:
    """The rows' masks and expected errors, and one swap at a time in every row that is still active."""

    def __init__(self, A: Tensor, variance: Tensor, wanda: Tensor, mask: Tensor, pattern: Pattern) -> None:
        self.A, self.wanda, self.mask, self.pattern = A, wanda, mask.clone(), pattern.base
        self.growth = A / variance
        self.growable, self.prunable = pattern.free(mask), mask.clone()  # a weight moves at most once
        self.eps = torch.where(mask, 0.0, A).sum(dim=1)
        self.active = torch.ones_like(self.eps, dtype=torch.bool)

    def step(self, threshold: float) -> bool:
        """Swap once in every active row; returns whether any row changed."""
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
        allowed = self.prunable
        if isinstance(self.pattern, SemiStructured):
            group = torch.arange(self.A.shape[1], device=self.A.device) // self.pattern.group
            allowed = allowed & (group == (grow // self.pattern.group)[:, None])
        else:
            allowed = allowed & (self.A * sign[:, None] < 0)
        return torch.where(allowed, self.wanda, torch.inf)

    def _entry(self, column: Tensor) -> Tensor:
        return self.A.gather(1, column[:, None]).squeeze(1)
