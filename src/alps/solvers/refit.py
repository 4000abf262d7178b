"""Refit of another method's weights: optimal values on its support, by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.patterns import Pattern
from alps.solvers.pcg import refit


@dataclass(frozen=True)
class Refitted(Method):
    """Another method, followed by a refit on its support (ALPS, arXiv 2406.07831, Tables 1 and 7).

    Weights of other methods are further from the optimum on their support than those of ALPS. The steps therefore
    continue until the masked residual is small.

    Attributes:
        base: method that chooses the support.
        damping: ridge towards the dense weight, as a fraction of the Gram's mean diagonal.
        max_steps: largest number of conjugate-gradient steps.
        tolerance: stop when every row's masked residual is below this fraction of its masked right-hand side.
    """

    base: Method
    damping: float = 0.01
    max_steps: int = 100
    tolerance: float = 1e-4

    @property
    def name(self) -> str:
        return f"{self.base.name}+refit"

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def by_rows(self) -> bool:
        return self.base.by_rows

    def traced(self) -> Refitted:
        return replace(self, base=self.base.traced())

    def prepare(self, stats: InputStats) -> tuple[Any, ScaledHessian]:
        return self.base.prepare(stats), scaled(stats, self.damping)

    def prune_matrix(self, weight: Tensor, state: tuple[Any, ScaledHessian], pattern: Pattern) -> Solution:
        base_state, hessian = state
        solution = self.base.solve(weight, base_state, pattern)
        W = weight / hessian.scale
        start = solution.weight / hessian.scale
        info = solution.info
        with info.timed("refit"):
            H, M = hessian.matrix, solution.mask
            refined = refit(H, W @ H, M, start, max_steps=self.max_steps, tolerance=self.tolerance)
        reference = hessian.undamped_energy(W) or 1.0
        if info.error_before_refit is None:
            info.error_before_refit = hessian.undamped_energy(start - W) / reference
        info.error_after_refit = hessian.undamped_energy(refined.weight - W) / reference
        info.refit_steps += refined.steps
        info.refit_residual = refined.residual
        info.damping = hessian.damping
        info.notes += [note for note in hessian.notes if note not in info.notes]
        return Solution(refined.weight * hessian.scale, solution.mask, info)
