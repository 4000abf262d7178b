"""The best weights on another method's support: any method, followed by conjugate gradients."""

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
    """`base`, then weights that are optimal on its support (ALPS, arXiv 2406.07831, Tables 1 and 7).

    A foreign support starts further from its optimum than ALPS's own, so the steps go on until the masked
    residual is small.

    Attributes:
        base: the method that chooses the support.
        damping: as in ALPS.
        max_steps, tolerance: stopping rule of the conjugate gradients, see `pcg.refit`.
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

    def _solve(self, weight: Tensor, state: tuple[Any, ScaledHessian], pattern: Pattern) -> Solution:
        inner, hessian = state
        solution = self.base.solve(weight, inner, pattern)
        W = weight / hessian.scale
        start = solution.weight / hessian.scale
        info = solution.info
        with info.timed("refit"):
            refined = refit(hessian.matrix, W @ hessian.matrix, solution.mask, start, self.max_steps, self.tolerance)
        reference = hessian.undamped_energy(W) or 1.0
        if info.error_before_refit is None:
            info.error_before_refit = hessian.undamped_energy(start - W) / reference
        info.error_after_refit = hessian.undamped_energy(refined.weight - W) / reference
        info.refit_steps += refined.steps
        info.refit_residual = refined.residual
        info.damping = hessian.damping
        info.notes += [note for note in hessian.notes if note not in info.notes]
        return Solution(refined.weight * hessian.scale, solution.mask, info)
