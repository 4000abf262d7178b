"""ALPS: l0-constrained least squares by operator splitting, refined by conjugate gradients.

legend  W  dense weight                               (out, in)
        H  damped Gram scaled to unit diagonal        (in, in)
        E  the scale, Diag(G + lam I)^{-1/2}          (in,)
        C  right-hand side W E^{-1} H                 (out, in)
Meng, Behdin, Wang, Mazumder: ALPS, NeurIPS 2024, arXiv 2406.07831: Section 3 (scaling), 3.1 (ADMM, Eq. 3-5),
3.2 (PCG, Algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.half_precision import has_fast_bfloat16
from alps.core.statistics import InputStats, Needs
from alps.solvers import admm
from alps.solvers.admm import AdmmResult, Steps
from alps.solvers.admm_fused import StreamingSteps
from alps.solvers.base import Method, Solution, SolveInfo, Status
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.patterns import Pattern, Unstructured, keep_largest
from alps.solvers.pcg import RefitResult, pcg_iterations
from alps.solvers.reductions import inner
from alps.solvers.row_parallel import Rows, RowShard, agreed, select
from alps.solvers.topk import apply_mask

# From this many weights on, a site's time is in its products.
_LARGE = 2**16


@dataclass(frozen=True)
class Alps(Method):
    """ALPS with the defaults of the paper and of its authors' code.

    Attributes:
        damping: ridge towards the dense weight, as a fraction of the Gram's mean diagonal.
        admm: penalty schedule and stopping rules.
        refit_steps: conjugate-gradient steps on the final support; 0 leaves ADMM's own weights.
        refit_tolerance: the refit stops earlier once every row's masked residual is below this.
        refit_gain: the refit stops earlier after a step that lowers the site's error by less than this share.
        precision: of the factors of the products inside the splitting. `auto` takes bfloat16 for large sites where
            the machine multiplies it faster than float32. The refit is float32 in any case.
        trace_errors: note the error of D at every check of the splitting; the answers are the same.
    """

    damping: float = 0.01
    admm: admm.AdmmSettings = field(default_factory=admm.AdmmSettings)
    refit_steps: int = 10
    refit_tolerance: float = 1e-5
    refit_gain: float = 3e-5
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    trace_errors: bool = False

    @property
    def name(self) -> str:
        return "alps"

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def traced(self) -> Alps:
        return replace(self, trace_errors=True)

    def prepare(self, stats: InputStats) -> ScaledHessian:
        return scaled(stats, self.damping)

    def solve_rows(self, weight: Tensor, state: ScaledHessian, pattern: Pattern, entries: int, rows: Rows) -> Solution:
        """Prune some rows of a matrix while other processes prune the others.

        The penalty follows the same schedule everywhere. Errors and traces are those of these rows.

        Args:
            weight: these rows, shape (rows, in), any float dtype; there may be none.
            state: what `prepare` made of the same statistics in every process.
            pattern: of the whole matrix, of which nothing has to stay zero.
            entries: of the whole matrix.
            rows: the processes.

        Raises:
            SolveFailed: when the weights, or the answer, are not finite, here or elsewhere.
        """
        assert not pattern.keeps_all
        dense = weight.detach().to(torch.float32)
        wrong = torch.stack([(~torch.isfinite(dense)).any(), dense.any()]).to("cpu", torch.int64)
        infinite, nonzero = rows.all_reduce_sum(wrong).tolist()
        if infinite:
            raise SolveFailed("the dense weights hold NaN or infinite values: repair the checkpoint first")
        part = RowShard.of(dense, pattern.sparsity, entries, rows) if isinstance(pattern, Unstructured) else pattern
        if not nonzero:
            mask = select(dense.abs(), part)
            return Solution(dense.clone(), mask, SolveInfo(Status.UNCHANGED, notes=list(state.notes)))
        solution = self._split(dense, state, part, entries, rows)
        solution.weight = torch.where(solution.mask, solution.weight, 0.0)
        if int(rows.all_reduce_sum((~torch.isfinite(solution.weight)).any().to("cpu", torch.int64))):
            raise SolveFailed(f"{self.name} produced NaN or infinite weights: use more calibration tokens")
        return solution

    def _solve(self, weight: Tensor, state: ScaledHessian, pattern: Pattern) -> Solution:
        if not bool(weight.any()):
            info = SolveInfo(Status.UNCHANGED, damping=state.damping, notes=list(state.notes))
            return Solution(weight.clone(), keep_largest((weight / state.scale).abs(), pattern), info)
        return self._split(weight, state, pattern, weight.numel())

    def _split(
        self, weight: Tensor, state: ScaledHessian, pattern: Pattern, entries: int, rows: Rows | None = None
    ) -> Solution:
        """Splitting and refit of a weight, or of some rows of one that has `entries`."""

        def total(count: int) -> int:
            return count if rows is None else int(rows.all_reduce_sum(torch.tensor(count, device=weight.device)))

        info = SolveInfo(damping=state.damping, notes=list(state.notes))
        W = weight / state.scale
        kept = entries - pattern.pruned_count(entries)
        energy = state.undamped_energy(W) if self.trace_errors else None
        with info.timed("admm"):
            split = admm.run(self._steps(state, W, pattern, entries), kept, self.admm, energy, total)
        info.status, info.iterations, info.restarts = split.status, split.iterations, split.restarts
        info.trace, info.gap = split.trace, split.gap
        if split.status is Status.MAX_ITERATIONS:
            info.notes.append(f"the support was still changing after {split.iterations} iterations")
        del W
        with info.timed("refit"):
            D = self._refit(state, weight, split, info, rows).weight
        return Solution(D.mul_(state.scale), split.mask, info)

    def _steps(self, state: ScaledHessian, W: Tensor, pattern: Pattern, entries: int) -> Steps:
        large = entries >= _LARGE
        low = self.precision == "bfloat16" or (self.precision == "auto" and large and has_fast_bfloat16(W.device))
        if large or low:
            return StreamingSteps(state, W, pattern, torch.bfloat16 if low else torch.float32)
        return admm.PlainSteps(state, W, W @ state.matrix, pattern)

    def _refit(
        self, state: ScaledHessian, weight: Tensor, split: AdmmResult, info: SolveInfo, rows: Rows | None
    ) -> RefitResult:
        """Refine the projected weights on their support; notes both errors, which cost no product of their own."""
        W = weight / state.scale
        C = W @ state.matrix
        reference = state.undamped(inner(C, W), W) or 1.0
        right = apply_mask(C, split.mask).norm(dim=1)
        delta = W.sub_(split.D)
        R = torch.mm(delta, state.matrix, out=C)
        energy = inner(R, delta)
        info.error_before_refit = state.undamped(energy, delta) / reference
        # The steps need the room.
        del W, C, delta
        least = self.refit_gain * agreed(0.0, energy, rows, R.device)[1]
        limits = (self.refit_steps, self.refit_tolerance, least)
        refined = pcg_iterations(state.matrix, R, split.mask, split.D, right, *limits, rows)
        delta = torch.div(weight, state.scale, out=R).sub_(refined.weight)
        info.error_after_refit = state.undamped(energy - refined.gain, delta) / reference
        info.refit_steps, info.refit_residual = refined.steps, refined.residual
        return refined
