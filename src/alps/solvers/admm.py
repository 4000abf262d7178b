"""The operator splitting of ALPS: find a support by driving two copies of the weights together.

legend  W     weights, free of the pattern                              (out, in)   Eq. 3
        D     weights, under the pattern                                (out, in)   Eq. 3
        V     multiplier of W = D; lives on the pruned entries only     (out, in)   Eq. 4
        H     Hessian with unit diagonal                                (in, in)
        C     right-hand side, W_dense H                                (out, in)
        rho   penalty on ||W - D||^2, grown by a schedule               scalar      Eq. 5
        k     number of entries that stay                               scalar
        s     entries by which the support of D changed since a check   scalar
ALPS (arXiv 2406.07831), Section 3.1 and Theorem 1. The early stop, the iteration limit and the restart with
a smaller penalty are in the authors' code and not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.solvers.base import Status, TracePoint
from alps.solvers.hessian import ScaledHessian
from alps.solvers.patterns import Pattern
from alps.solvers.row_parallel import select
from alps.solvers.topk import apply_mask


@dataclass(frozen=True)
class AdmmSettings:
    """The penalty schedule and the stopping rules.

    Attributes:
        rho: first penalty; dimensionless, because H has unit diagonal.
        check_every: iterations between two looks at the support.
        growth: (share of k that changed, factor on rho), largest share first; a smaller but nonzero change
            takes the last factor.
        max_iterations: at most so many, restarts included.
        settle_after: from this iteration on a change below `settle_share` of k ends the loop.
        settle_share: see `settle_after`.
        restart_share: when the first checks move less than this share of k, the penalty is too stiff: the loop
            starts over with `rho * restart_factor`.
        restart_factor: see `restart_share`.
        max_restarts: at most so many; with few kept entries a support can rest by chance.
    """

    rho: float = 0.1
    check_every: int = 3
    growth: tuple[tuple[float, float], ...] = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
    max_iterations: int = 300
    settle_after: int = 30
    settle_share: float = 3e-4
    restart_share: float = 0.005
    restart_factor: float = 0.2
    max_restarts: int = 4

    def __post_init__(self) -> None:
        factors = (self.rho, self.restart_factor, *(factor for _, factor in self.growth))
        if self.check_every < 1 or not all(0 < factor < math.inf for factor in factors):
            raise ConfigError(
                "The penalty's schedule needs a check_every of at least 1, and a rho and factors above 0."
            )


# `high` anneals eight times as slowly: the square root of every growth factor, after 12 iterations in place of 3.
EFFORTS: dict[str, AdmmSettings] = {
    "normal": AdmmSettings(),
    "high": AdmmSettings(
        growth=((0.1, 1.14), (0.005, 1.095), (0.0, 1.05)), check_every=12, settle_after=240, max_iterations=1000
    ),
}


@dataclass
class AdmmResult:
    """The projected weights D (out, in), their support, and how the loop went."""

    D: Tensor
    mask: Tensor
    status: Status
    iterations: int
    restarts: int
    gap: float
    trace: list[TracePoint]


class Steps(Protocol):
    """The iterations themselves, which the schedule below drives."""

    @property
    def mask(self) -> Tensor:
        """Support of D, shape (out, in), boolean; no later step changes it."""

    def restart(self) -> None:
        """Go back to D = projection of the dense weight, V = 0."""

    def step(self, rho: float) -> None:
        """One W-step and one projection with the penalty rho."""

    def gap(self) -> float:
        """||W - D||_F / ||W||_F after the last step."""

    def lost_energy(self) -> float:
        """What D has lost of the outputs' energy after the last step, the damping's share taken out."""

    def projected(self) -> Tensor:
        """D, shape (out, in); the steps are over then."""


class PlainSteps:
    """The steps as published, in float32: what small sites take, and what `streaming.StreamingSteps` is held to."""

    def __init__(self, hessian: ScaledHessian, dense: Tensor, C: Tensor, pattern: Pattern) -> None:
        self._hessian, self._dense, self._C, self._pattern = hessian, dense, C, pattern
        self._inverse: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        self.mask = select(self._dense.abs(), self._pattern)
        self._D, self._V = apply_mask(self._dense, self.mask), torch.zeros_like(self._dense)
        self._W, self._inverse, self._rho = self._dense, None, 0.0

    def step(self, rho: float) -> None:
        if self._inverse is None or rho != self._rho:
            self._inverse, self._rho = self._hessian.inverse(rho), rho
        self._W = w_step(self._inverse, self._C, self._D, self._V, rho)
        self._D, self._V, self.mask = project(self._W, self._V, rho, self._pattern)

    def gap(self) -> float:
        return float((self._W - self._D).norm() / self._W.norm().clamp_min(1e-38))

    def lost_energy(self) -> float:
        return self._hessian.lost_energy(self._dense, self._D)

    def projected(self) -> Tensor:
        return self._D


def run(
    steps: Steps, k: int, settings: AdmmSettings, energy: float | None = None, total: Callable[[int], int] = int
) -> AdmmResult:
    """Drive the splitting from the magnitude projection of the scaled dense weight until its support rests.

    Args:
        steps: the splitting, not yet begun.
        k: number of entries that stay.
        settings: schedule and stopping rules.
        energy: of the dense outputs; where given, every check notes the error of D, which takes a product.
        total: sums a count over the processes that hold other rows, so that the schedule is the same for all.
    """
    mask_at_check = steps.mask
    rho, grown, restarts, trace = settings.rho, False, 0, list[TracePoint]()
    status, iteration, gap = Status.MAX_ITERATIONS, 0, 0.0
    for iteration in range(1, settings.max_iterations + 1):
        steps.step(rho)
        if iteration % settings.check_every:
            continue
        change, gap = total(int(torch.count_nonzero(steps.mask ^ mask_at_check))), steps.gap()
        trace.append(TracePoint(iteration, rho, change, gap, steps.lost_energy() / energy if energy else None))
        if not grown and change < settings.restart_share * k and restarts < settings.max_restarts:
            restarts, rho = restarts + 1, rho * settings.restart_factor
            steps.restart()
            mask_at_check = steps.mask
            continue
        mask_at_check, grown = steps.mask, True
        if change == 0:
            status = Status.CONVERGED
            break
        if iteration > settings.settle_after and change < settings.settle_share * k:
            status = Status.SETTLED
            break
        rho = grow(rho, change / k, settings)
    D = steps.projected()
    return AdmmResult(D, steps.mask, status, iteration, restarts, gap, trace)


def w_step(inverse: Tensor, C: Tensor, D: Tensor, V: Tensor, rho: float) -> Tensor:
    """W = (C - V + rho D)(H + rho I)^{-1}: the minimiser of the augmented Lagrangian over W (Eq. 4)."""
    return torch.add(C, D, alpha=rho).sub_(V) @ inverse


def project(W: Tensor, V: Tensor, rho: float, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """D = P_k(W + V / rho), then V <- V + rho (W - D), and the support of D (Eq. 4).

    Since D equals W + V / rho on its support, the new V is rho (W + V / rho) off the support and zero on it.
    """
    Z = torch.add(W, V, alpha=1 / rho)
    mask = select(Z.abs(), pattern)
    D = apply_mask(Z, mask)
    return D, Z.sub_(D).mul_(rho), mask


def grow(rho: float, share: float, settings: AdmmSettings) -> float:
    """The next penalty after a check at which `share` of the kept entries changed (Eq. 5)."""
    for threshold, factor in settings.growth:
        if share >= threshold:
            return rho * factor
    return rho
