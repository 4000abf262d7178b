"""ALPS: l0-constrained least squares by operator splitting, refined by conjugate gradients.

legend  W  dense weight                               (out, in)
        H  damped Gram scaled to unit diagonal        (in, in)
        E  the scale, Diag(G + lam I)^{-1/2}          (in,)
        C  right-hand side W E^{-1} H                 (out, in)
Meng, Behdin, Wang, Mazumder: ALPS, NeurIPS 2024, arXiv 2406.07831: Section 3 (scaling), 3.1 (ADMM, Eq. 3-5),
3.2 (PCG, Algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from alps.solvers import admm
from alps.solvers.base import Method, Solution, SolveInfo, Status
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.pattern import Pattern, keep_largest
from alps.solvers.pcg import refit
from alps.stats import InputStats, Needs


@dataclass(frozen=True)
class Alps(Method):
    """ALPS with the defaults of the paper and of its authors' code.

    Attributes:
        damping: ridge towards the dense weight, as a fraction of the Gram's mean diagonal.
        admm: penalty schedule and stopping rules.
        refit_steps: conjugate-gradient steps on the final support; 0 leaves ADMM's own weights.
        refit_tolerance: the refit stops earlier once every row's masked residual is below this.
    """

    damping: float = 0.01
    admm: admm.AdmmSettings = field(default_factory=admm.AdmmSettings)
    refit_steps: int = 10
    refit_tolerance: float = 1e-5

    @property
    def name(self) -> str:
        return "alps"

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def prepare(self, stats: InputStats) -> ScaledHessian:
        return scaled(stats, self.damping)

    def _solve(self, weight: Tensor, state: ScaledHessian, pattern: Pattern) -> Solution:
        info = SolveInfo(damping=state.damping, notes=list(state.notes))
        W = weight / state.scale
        if not bool(W.any()):
            info.status = Status.UNCHANGED
            return Solution(weight.clone(), keep_largest(W.abs(), pattern), info)
        C = W @ state.matrix
        with info.timed("admm"):
            split = admm.run(state, W, C, pattern, self.admm)
        with info.timed("refit"):
            refined = refit(state.matrix, C, split.mask, split.D, self.refit_steps, self.refit_tolerance)
        reference = state.undamped_energy(W) or 1.0
        info.status, info.iterations, info.restarts = split.status, split.iterations, split.restarts
        info.trace, info.gap = split.trace, split.gap
        info.error_before_refit = state.undamped_energy(split.D - W) / reference
        info.error_after_refit = state.undamped_energy(refined.weight - W) / reference
        info.refit_steps, info.refit_residual = refined.steps, refined.residual
        if split.status is Status.MAX_ITERATIONS:
            info.notes.append(f"the support was still changing after {split.iterations} iterations")
        return Solution(refined.weight * state.scale, split.mask, info)
