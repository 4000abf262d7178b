"""What every pruning method is, and what it answers: `prepare` once per input, `solve` once per site."""

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
    """How a solve ended."""

    DIRECT = "direct"  # a method without iterations: there is nothing to converge
    UNCHANGED = "unchanged"  # the pattern keeps everything, every weight is zero already, or zeros enough are there
    CONVERGED = "converged"  # the support did not change between two checks
    SETTLED = "settled"  # it still changed, by less than the method's tolerance
    MAX_ITERATIONS = "max_iterations"  # the support was still moving when the iterations ran out


@dataclass
class TracePoint:
    """One check of an iterative solve: iteration, penalty, support entries changed, relative ||W - D||.

    `error` is the relative reconstruction error of D in the problem that is solved; None unless the method is `traced`.
    """

    iteration: int
    rho: float
    support_change: int
    gap: float
    error: float | None = None


@dataclass
class SolveInfo:
    """The record of one solve.

    Attributes:
        status: how it ended.
        iterations: iterations of the main loop, restarts included; 0 for direct methods.
        restarts: how often the loop began anew with a smaller penalty.
        trace: one point for every check of the support (ALPS only).
        gap: ||W - D||_F / ||W||_F at the end: how far the two copies of the weights are apart (ALPS only).
        damping: the absolute lambda added to the diagonal of X^T X; 0 where none is used.
        error_before_refit, error_after_refit: relative reconstruction error around the refit, where one ran.
        refit_steps: conjugate-gradient steps taken.
        refit_residual: largest relative masked residual of a row after the refit.
        seconds: wall time by phase.
        notes: anything a user should see, such as damping that had to be raised.
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
    """The pruned weight (out, in) in float32 with +0.0 where pruned, its support, and the record."""

    weight: Tensor
    mask: Tensor
    info: SolveInfo


class Method(ABC):
    """A pruning method: a frozen dataclass of its own hyper-parameters.

    Every method depends on the statistics only up to their scale: twice the tokens of the same
    distribution change nothing.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which users ask for the method."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What `prepare` reads of the statistics."""

    @property
    def by_rows(self) -> bool:
        """Whether an unstructured pattern is held by every row, so that no zero moves from one to another."""
        return False

    def traced(self) -> Method:
        """The same method, with the same answers to the bit, that notes more of its iterations at some cost."""
        return self

    @abstractmethod
    def prepare(self, stats: InputStats) -> Any:
        """Turn the statistics of one input into what every site fed by it shares (a factor, say)."""

    @abstractmethod
    def _solve(self, weight: Tensor, state: Any, pattern: Pattern) -> Solution:
        """Prune one float32 matrix (out, in) that has nonzero weights, under a pattern that prunes."""

    def solve(self, weight: Tensor, state: Any, pattern: Pattern) -> Solution:
        """Prune one matrix.

        Args:
            weight: dense weights, shape (out, in), any float dtype.
            state: what `prepare` returned for the inputs of this matrix.
            pattern: what must be kept; its group must divide the number of inputs.

        Raises:
            SolveFailed: when the weights, or the answer, are not finite.
        """
        assert weight.ndim == 2 and pattern.fits(weight.shape[1])
        dense = weight.detach().to(torch.float32)
        if not bool(torch.isfinite(dense).all()):
            raise SolveFailed("the dense weights hold NaN or infinite values: repair the checkpoint first")
        if pattern.keeps_all:
            return Solution(dense.clone(), torch.ones_like(dense, dtype=torch.bool), SolveInfo(Status.UNCHANGED))
        if isinstance(pattern, MaskedPattern) and pattern.settled and not bool((dense != 0)[~pattern.allowed].any()):
            # Nothing is to be chosen, and the weight is its own best approximation.
            info = SolveInfo(Status.UNCHANGED)
            return Solution(torch.where(pattern.allowed, dense, 0.0), pattern.allowed.clone(), info)
        solution = self._solve(dense, state, pattern)
        kept = int(solution.mask.sum())
        assert kept == dense.numel() - pattern.pruned_count(dense.numel()), (self.name, str(pattern), kept)
        # where() rather than a product: a pruned weight is +0.0, never -0.0 or NaN * 0.
        solution.weight = torch.where(solution.mask, solution.weight, 0.0)
        if not bool(torch.isfinite(solution.weight).all()):
            raise SolveFailed(
                f"{self.name} produced NaN or infinite weights: use more calibration tokens or raise the damping"
            )
        return solution
