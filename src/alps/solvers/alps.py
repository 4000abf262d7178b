"""ALPS: l0-constrained least squares by ADMM, followed by conjugate gradients on the support.

legend  W  dense weight                               (out, in)
        H  damped Gram scaled to unit diagonal        (in, in)
        E  scale, Diag(G + lam I)^{-1/2}              (in,)
        C  right-hand side W E^{-1} H                 (out, in)
Meng, Behdin, Wang, Mazumder: ALPS, NeurIPS 2024, arXiv 2406.07831: Section 3 (scaling), 3.1 (ADMM, Eq. 3-5),
3.2 (PCG, Algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.core.half_precision import has_fast_bfloat16
from alps.core.statistics import InputStats, Needs
from alps.solvers import admm
from alps.solvers.admm import AdmmResult, Steps
from alps.solvers.admm_fused import FusedSteps
from alps.solvers.base import Method, Solution, SolveInfo, Status
from alps.solvers.hessian import ScaledHessian, inner, scaled
from alps.solvers.patterns import Pattern, Unstructured, keep_largest
from alps.solvers.pcg import RefitResult, pcg_iterations
from alps.solvers.row_parallel import RowShard, all_reduce_max_and_sum
from alps.solvers.topk import apply_mask

# A layer with at least this many weights spends most of its time in matrix products.
_MIN_FUSED_ENTRIES = 2**16


@dataclass(frozen=True)
class Alps(Method):
    """ALPS with the defaults of the paper and of its authors' code.

    Attributes:
        damping: ridge towards the dense weight, as a fraction of the Gram's mean diagonal.
        admm: penalty schedule and stopping rules.
        refit_steps: largest number of conjugate-gradient steps on the final support; 0 returns the weights of ADMM.
        refit_tolerance: the refit stops when every row's masked residual is below this fraction of its right-hand side.
        refit_gain: the refit stops after a step that lowers the layer's error by less than this fraction.
        precision: dtype of the factors of the products in ADMM. `auto` uses bfloat16 for large layers on devices that
            multiply it faster than float32. The refit always uses float32.
        trace_errors: record the error of D at every check of ADMM; the weights do not change.
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

    def solve_rows(
        self, weight: Tensor, state: ScaledHessian, pattern: Pattern, *, entries: int, group: ProcessGroup
    ) -> Solution:
        """Prune some rows of a matrix while other ranks prune the other rows.

        All ranks follow the same penalty schedule. Errors and traces are those of the rows on this rank.

        Args:
            weight: rows on this rank, shape (rows, in), any float dtype; there may be none.
            state: result of `prepare`, equal on all ranks.
            pattern: pattern of the whole matrix; not a `MaskedPattern`.
            entries: number of entries of the whole matrix.
            group: ranks that hold the rows of the matrix.

        Raises:
            SolveFailed: if the dense or the pruned weights are not finite on any rank.
        """
        assert not pattern.keeps_all
        dense = weight.detach().to(torch.float32)
        flags = torch.stack([(~torch.isfinite(dense)).any(), dense.any()]).to("cpu", torch.int64)
        infinite, nonzero = group.all_reduce_sum(flags).tolist()
        if infinite:
            raise SolveFailed("the dense weights hold NaN or infinite values: repair the checkpoint first")
        part = RowShard.of(dense, pattern.sparsity, entries, group) if isinstance(pattern, Unstructured) else pattern
        if not nonzero:
            mask = part.select(dense.abs())
            return Solution(dense.clone(), mask, SolveInfo(Status.UNCHANGED, notes=list(state.notes)))
        solution = self._run_admm_and_refit(dense, state, part, entries=entries, group=group)
        solution.weight = torch.where(solution.mask, solution.weight, 0.0)
        if int(group.all_reduce_sum((~torch.isfinite(solution.weight)).any().to("cpu", torch.int64))):
            raise SolveFailed(f"{self.name} produced NaN or infinite weights: use more calibration tokens")
        return solution

    def prune_matrix(self, weight: Tensor, state: ScaledHessian, pattern: Pattern) -> Solution:
        if not bool(weight.any()):
            info = SolveInfo(Status.UNCHANGED, damping=state.damping, notes=list(state.notes))
            return Solution(weight.clone(), keep_largest((weight / state.scale).abs(), pattern), info)
        return self._run_admm_and_refit(weight, state, pattern, entries=weight.numel())

    def _run_admm_and_refit(
        self,
        weight: Tensor,
        state: ScaledHessian,
        pattern: Pattern,
        *,
        entries: int,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Solution:
        """Prune a weight with a nonzero entry, or some rows of a matrix of `entries` weights."""

        def sum_over_ranks(count: int) -> int:
            return count if group.size == 1 else int(group.all_reduce_sum(torch.tensor(count, device=weight.device)))

        info = SolveInfo(damping=state.damping, notes=list(state.notes))
        W = weight / state.scale
        kept = entries - pattern.pruned_count(entries)
        energy = state.undamped_energy(W) if self.trace_errors else None
        with info.timed("admm"):
            steps = self._steps(state, W, pattern, entries)
            result = admm.run(steps, kept, self.admm, energy=energy, sum_over_ranks=sum_over_ranks)
            del steps
        info.status, info.iterations, info.restarts = result.status, result.iterations, result.restarts
        info.trace, info.gap = result.trace, result.gap
        if result.status is Status.MAX_ITERATIONS:
            info.notes.append(f"the support was still changing after {result.iterations} iterations")
        del W
        with info.timed("refit"):
            D = self._refit(state, weight, result, info=info, group=group).weight
        return Solution(D.mul_(state.scale), result.mask, info)

    def _steps(self, state: ScaledHessian, W: Tensor, pattern: Pattern, entries: int) -> Steps:
        """Choose the ADMM steps and their precision by the size of the layer and the device."""
        is_large = entries >= _MIN_FUSED_ENTRIES
        in_bfloat16 = self.precision == "bfloat16" or (
            self.precision == "auto" and is_large and has_fast_bfloat16(W.device)
        )
        if is_large or in_bfloat16:
            return FusedSteps(state, W, pattern, torch.bfloat16 if in_bfloat16 else torch.float32)
        return admm.PlainSteps(state, W, W @ state.matrix, pattern)

    def _refit(
        self, state: ScaledHessian, weight: Tensor, result: AdmmResult, *, info: SolveInfo, group: ProcessGroup
    ) -> RefitResult:
        """Refit the projected weights on their support, and record the errors before and after it."""
        W = weight / state.scale
        C = W @ state.matrix
        reference = state.undamped(inner(C, W), W) or 1.0
        rhs_norm = apply_mask(C, result.mask).norm(dim=1)
        delta = W.sub_(result.D)
        R = torch.mm(delta, state.matrix, out=C)
        energy = inner(R, delta)
        info.error_before_refit = state.undamped(energy, delta) / reference
        # The iterations need the memory.
        del W, C, delta
        _, total_energy = all_reduce_max_and_sum(0.0, energy, group, R.device)
        refined = pcg_iterations(
            state.matrix,
            R,
            result.mask,
            result.D,
            rhs_norm=rhs_norm,
            max_steps=self.refit_steps,
            tolerance=self.refit_tolerance,
            min_gain=self.refit_gain * total_energy,
            group=group,
        )
        delta = torch.div(weight, state.scale, out=R).sub_(refined.weight)
        info.error_after_refit = state.undamped(energy - refined.gain, delta) / reference
        info.refit_steps, info.refit_residual = refined.steps, refined.residual
        return refined
