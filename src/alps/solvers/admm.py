"""ADMM of ALPS: find a support by driving two copies of the weights together.

legend  W     weights, free of the pattern                              (out, in)   Eq. 3
        D     weights, under the pattern                                (out, in)   Eq. 3
        V     multiplier of W = D; lives on the pruned entries only     (out, in)   Eq. 4
        H     Hessian with unit diagonal                                (in, in)
        C     right-hand side, W_dense H                                (out, in)
        rho   penalty on ||W - D||^2, grown by a schedule               scalar      Eq. 5
        k     number of kept entries                                    scalar
        s     entries by which the support of D changed since a check   scalar
ALPS (arXiv 2406.07831), Section 3.1 and Theorem 1. The early stop, the iteration limit and the restart with a smaller
penalty are in the authors' code and not in the paper.
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
from alps.solvers.topk import apply_mask


@dataclass(frozen=True)
class AdmmSettings:
    """The penalty schedule and the stopping rules.

    Attributes:
        rho: first penalty; dimensionless, because H has unit diagonal.
        check_every: iterations between two checks of the support.
        growth: pairs (changed fraction of k, factor on rho), largest fraction first. The last factor applies to any
            smaller nonzero change.
        max_iterations: largest number of iterations, restarts included.
        settle_after: after this iteration a change below `settle_share` of k ends the loop.
        settle_share: see `settle_after`.
        restart_share: if the first checks find a change below this fraction of k, the penalty is too large, and the
            loop starts over with `rho * restart_factor`.
        restart_factor: see `restart_share`.
        max_restarts: largest number of restarts. A support of few entries can be unchanged by chance.

    Raises:
        ConfigError: if `check_every` is below 1, or `rho` or a factor is not positive and finite.
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
                "The penalty schedule is invalid: check_every must be at least 1, and rho and all factors positive."
            )


# `high` raises the penalty eight times as slowly: by the square root of every factor, every 12 iterations instead of 3.
EFFORTS: dict[str, AdmmSettings] = {
    "normal": AdmmSettings(),
    "high": AdmmSettings(
        growth=((0.1, 1.14), (0.005, 1.095), (0.0, 1.05)), check_every=12, settle_after=240, max_iterations=1000
    ),
}


@dataclass
class AdmmResult:
    """Result of ADMM.

    Attributes:
        D: projected weights, shape (out, in).
        mask: support of D, shape (out, in), boolean.
        status: reason for which the loop ended.
        iterations: number of iterations, restarts included.
        restarts: number of restarts with a smaller penalty.
        gap: ||W - D||_F / ||W||_F at the last check.
        trace: one point for every check of the support.
    """

    D: Tensor
    mask: Tensor
    status: Status
    iterations: int
    restarts: int
    gap: float
    trace: list[TracePoint]


class Steps(Protocol):
    """State and iterations of ADMM; `run` applies the penalty schedule to them."""

    @property
    def mask(self) -> Tensor:
        """Support of D, shape (out, in), boolean; later steps do not modify the tensor."""

    def restart(self) -> None:
        """Set D to the projection of the dense weight, and V to 0."""

    def step(self, rho: float) -> None:
        """Run one W-step and one projection with the penalty rho."""

    def gap(self) -> float:
        """Return ||W - D||_F / ||W||_F after the last step."""

    def lost_energy(self) -> float:
        """Return the energy of the outputs that D has lost after the last step, without the damping term."""

    def projected(self) -> Tensor:
        """Return D, shape (out, in); no step may follow."""


class PlainSteps:
    """The steps as published, in float32: used for small layers, and as the reference for `admm_fused.FusedSteps`."""

    def __init__(self, hessian: ScaledHessian, dense: Tensor, C: Tensor, pattern: Pattern) -> None:
        self._hessian, self._dense, self._C, self._pattern = hessian, dense, C, pattern
        self._inverse: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Set D to the projection of the dense weight, and V to 0."""
        self.mask = self._pattern.select(self._dense.abs())
        self._D, self._V = apply_mask(self._dense, self.mask), torch.zeros_like(self._dense)
        self._W, self._inverse, self._rho = self._dense, None, 0.0

    def step(self, rho: float) -> None:
        """Run one W-step and one projection with the penalty rho."""
        if self._inverse is None or rho != self._rho:
            self._inverse, self._rho = self._hessian.inverse(rho), rho
        self._W = w_step(self._inverse, self._C, self._D, self._V, rho=rho)
        self._D, self._V, self.mask = project(self._W, self._V, rho, self._pattern)

    def gap(self) -> float:
        """Return ||W - D||_F / ||W||_F after the last step."""
        return float((self._W - self._D).norm() / self._W.norm().clamp_min(1e-38))

    def lost_energy(self) -> float:
        """Return the energy of the outputs that D has lost after the last step, without the damping term."""
        return self._hessian.lost_energy(self._dense, self._D)

    def projected(self) -> Tensor:
        """Return D, shape (out, in)."""
        return self._D


def run(
    steps: Steps,
    k: int,
    settings: AdmmSettings,
    *,
    energy: float | None = None,
    sum_over_ranks: Callable[[int], int] = int,
) -> AdmmResult:
    """Run ADMM from the magnitude projection of the scaled dense weight until the support stops changing.

    Args:
        steps: the iterations, in their initial state.
        k: number of kept entries.
        settings: schedule and stopping rules.
        energy: energy of the dense outputs. If given, every check records the error of D, which costs a product.
        sum_over_ranks: sums a count over the ranks that hold other rows, so that all follow the same schedule.
    """
    mask_at_check = steps.mask
    rho, grown, restarts, trace = settings.rho, False, 0, list[TracePoint]()
    status, iteration, gap = Status.MAX_ITERATIONS, 0, 0.0
    for iteration in range(1, settings.max_iterations + 1):
        steps.step(rho)
        if iteration % settings.check_every:
            continue
        change, gap = sum_over_ranks(int(torch.count_nonzero(steps.mask ^ mask_at_check))), steps.gap()
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


def w_step(inverse: Tensor, C: Tensor, D: Tensor, V: Tensor, *, rho: float) -> Tensor:
    """Return W = (C - V + rho D)(H + rho I)^{-1}, the minimiser of the augmented Lagrangian over W (Eq. 4)."""
    return torch.add(C, D, alpha=rho).sub_(V) @ inverse


def project(W: Tensor, V: Tensor, rho: float, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """Return D = P_k(W + V / rho), the new V + rho (W - D), and the support of D (Eq. 4).

    D equals W + V / rho on its support, so that the new V is rho (W + V / rho) off the support and zero on it.
    """
    Z = torch.add(W, V, alpha=1 / rho)
    mask = pattern.select(Z.abs())
    D = apply_mask(Z, mask)
    return D, Z.sub_(D).mul_(rho), mask


def grow(rho: float, share: float, settings: AdmmSettings) -> float:
    """Return the next penalty after a check at which the fraction `share` of the kept entries changed (Eq. 5)."""
    for threshold, factor in settings.growth:
        if share >= threshold:
            return rho * factor
    return rho
