"""Interface of the pruning methods, and the results that they return.

A run calls `prepare` once per input and `solve` once per layer that reads this input. A method of your own is a
subclass of `Method`; docs/how-to/own-method.md shows one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats, Needs
from alps.solvers.patterns import MaskedPattern, Pattern


class Status(StrEnum):
    """Reason for which a solve ended.

    Attributes:
        DIRECT: the method has no iterations.
        UNCHANGED: the pattern keeps everything, the weight is zero, or it has enough zeros already.
        CONVERGED: the support did not change between two checks.
        SETTLED: the support still changed, by less than the method's tolerance.
        MAX_ITERATIONS: the support was still changing at the iteration limit.
    """

    DIRECT = "direct"
    UNCHANGED = "unchanged"
    CONVERGED = "converged"
    SETTLED = "settled"
    MAX_ITERATIONS = "max_iterations"


@dataclass
class TracePoint:
    """One check of the support during an iterative solve.

    Attributes:
        iteration: number of the iteration, from 1.
        rho: penalty of this iteration.
        support_change: entries by which the support changed since the last check.
        gap: ||W - D||_F / ||W||_F.
        error: relative reconstruction error of D in the solved problem; None unless the method is `traced`.
    """

    iteration: int
    rho: float
    support_change: int
    gap: float
    error: float | None = None


@dataclass
class SolveInfo:
    """Record of one solve.

    Attributes:
        status: reason for which it ended.
        iterations: iterations of the main loop, restarts included; 0 for direct methods.
        restarts: number of times the loop started over with a smaller penalty.
        trace: one point for every check of the support (ALPS only).
        gap: ||W - D||_F / ||W||_F at the end, the distance between the two copies of the weights (ALPS only).
        damping: the absolute lambda added to the diagonal of X^T X; 0 if none is used.
        error_before_refit: relative reconstruction error before the refit; None without a refit.
        error_after_refit: relative reconstruction error after the refit; None without a refit.
        refit_steps: conjugate-gradient steps taken.
        refit_residual: largest relative masked residual of a row after the refit.
        seconds: wall time by phase.
        notes: remarks for the user, such as damping that had to be raised.
    """

    status: Status = Status.DIRECT
    iterations: int = 0
    restarts: int = 0
    trace: list[TracePoint] = field(default_factory=list)
    gap: float | None = None
    damping: float = 0.0
    error_before_refit: float | None = None
    error_after_refit: float | None = None
    refit_steps: int = 0
    refit_residual: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the body to `seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Solution:
    """Result of one solve.

    Attributes:
        weight: pruned weight, shape (out, in), float32, +0.0 where pruned.
        mask: its support, shape (out, in), boolean, True = kept.
        info: record of the solve.
    """

    weight: Tensor
    mask: Tensor
    info: SolveInfo


class Method(ABC):
    """A pruning method: a frozen dataclass of its own hyperparameters.

    No method depends on the scale of the statistics: twice the tokens of the same distribution change nothing.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the method, as users write it."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Statistics that `prepare` reads."""

    @property
    def by_rows(self) -> bool:
        """True if every row satisfies an unstructured pattern, so that no zero moves from one row to another."""
        return False

    def traced(self) -> Method:
        """Return this method with a more detailed trace of its iterations; the weights are the same to the bit."""
        return self

    @abstractmethod
    def prepare(self, stats: InputStats) -> Any:
        """Compute from the statistics of one input what all layers that read it share, such as a factorisation."""

    @abstractmethod
    def prune_matrix(self, weight: Tensor, state: Any, pattern: Pattern) -> Solution:
        """Prune one float32 matrix (out, in) that has nonzero weights, under a pattern that prunes.

        Methods define this; `solve` calls it, and checks what it returns.
        """

    def solve(self, weight: Tensor, state: Any, pattern: Pattern) -> Solution:
        """Prune one matrix.

        Args:
            weight: dense weights, shape (out, in), any float dtype.
            state: result of `prepare` for the inputs of this matrix.
            pattern: the sparsity pattern; its group must divide the number of inputs.

        Raises:
            SolveFailed: if the dense or the pruned weights are not finite, or the method keeps more or fewer weights
                than the pattern.
        """
        assert weight.ndim == 2 and pattern.fits(weight.shape[1])
        dense = weight.detach().to(torch.float32)
        if not bool(torch.isfinite(dense).all()):
            raise SolveFailed("the dense weights hold NaN or infinite values: repair the checkpoint first")
        if pattern.keeps_all:
            return Solution(dense.clone(), torch.ones_like(dense, dtype=torch.bool), SolveInfo(Status.UNCHANGED))
        if isinstance(pattern, MaskedPattern) and pattern.is_satisfied and not bool(dense[~pattern.allowed].any()):
            # There is nothing to choose, and the weight is its own best approximation.
            info = SolveInfo(Status.UNCHANGED)
            return Solution(torch.where(pattern.allowed, dense, 0.0), pattern.allowed.clone(), info)
        solution = self.prune_matrix(dense, state, pattern)
        kept, expected = int(solution.mask.sum()), dense.numel() - pattern.pruned_count(dense.numel())
        if kept != expected:
            raise SolveFailed(
                f"{self.name} kept {kept} of {dense.numel()} weights, where the pattern {pattern} keeps {expected}: "
                "choose the mask by alps.solvers.keep_largest"
            )
        # where() instead of a product: a pruned weight is +0.0, never -0.0 or NaN * 0.
        solution.weight = torch.where(solution.mask, solution.weight, 0.0)
        if not bool(torch.isfinite(solution.weight).all()):
            raise SolveFailed(
                f"{self.name} produced NaN or infinite weights: use more calibration tokens or raise the damping"
            )
        return solution
