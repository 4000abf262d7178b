"""The splitting of ALPS under its own schedule and under penalties that never grow, watched as it goes.

legend  D    the sparse iterate                     (out, in)
        rho  penalty on ||W - D||^2                 scalar
        k    number of entries that stay            scalar
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alps.solvers import admm
from alps.solvers.admm import AdmmSettings, PlainSteps
from alps.solvers.hessian import scaled
from alps.solvers.objective import relative_error
from alps.solvers.pattern import Pattern
from layers import Problem, exact_weights


@dataclass(frozen=True)
class Course:
    """What a run of the splitting looked like.

    Attributes:
        name: `schedule`, or `rho` and its value.
        errors: relative errors of D after the iterations asked for; D rests where the loop has ended.
        changes: entries that came into the support or left it in that iteration, over k, as the schedule counts them;
            None where the loop has ended.
        optimal: relative error of the optimal weights on the last support.
        end: how the loop ended.
    """

    name: str
    errors: list[float]
    changes: list[float | None]
    optimal: float
    end: str


class Watched:
    """The steps as published, in float32, with a note of D and its support after some iterations.

    Iterations count from the beginning, restarts included, as the schedule counts them.
    """

    def __init__(self, problem: Problem, pattern: Pattern, wanted: Sequence[int]) -> None:
        self._problem, self._wanted = problem, set(wanted)
        weight, stats = problem
        state = scaled(stats, 0.01)
        self._scale, W = state.scale, weight / state.scale
        self._inner = PlainSteps(state, W, W @ state.matrix, pattern)
        self.kept = W.numel() - pattern.pruned_count(W.numel())
        self.iteration, self.noted = 0, dict[int, tuple[float, float]]()

    @property
    def mask(self) -> Tensor:
        return self._inner.mask

    def restart(self) -> None:
        self._inner.restart()

    def step(self, rho: float) -> None:
        before = self._inner.mask
        self._inner.step(rho)
        self.iteration += 1
        if self.iteration in self._wanted:
            change = int(torch.count_nonzero(self._inner.mask ^ before)) / self.kept
            self.noted[self.iteration] = self.error(), change

    def gap(self) -> float:
        return self._inner.gap()

    def projected(self) -> Tensor:
        return self._inner.projected()

    def error(self) -> float:
        """Relative error of D as it stands, in the coordinates of the weight."""
        return relative_error(self._inner.projected() * self._scale, *self._problem)


def courses(problem: Problem, pattern: Pattern, iterations: Sequence[int], fixed: Sequence[float]) -> list[Course]:
    """The schedule's course, then that of every fixed penalty."""
    last = max(iterations)
    runs = {"schedule": replace(AdmmSettings(), max_iterations=last)}
    # Without a look at the support there is no growth, no restart, and no early end.
    runs |= {f"rho {rho:g}": AdmmSettings(rho=rho, check_every=last + 1, max_iterations=last) for rho in fixed}
    return [_course(name, settings, problem, pattern, iterations) for name, settings in runs.items()]


def _course(name: str, settings: AdmmSettings, problem: Problem, pattern: Pattern, iterations: Sequence[int]) -> Course:
    steps = Watched(problem, pattern, iterations)
    result = admm.run(steps, steps.kept, settings)
    rest = steps.error()
    return Course(
        name=name,
        errors=[steps.noted[t][0] if t in steps.noted else rest for t in iterations],
        changes=[steps.noted[t][1] if t in steps.noted else None for t in iterations],
        optimal=relative_error(exact_weights(problem, result.mask), *problem),
        end=f"{result.status} after {result.iterations} iterations, {result.restarts} restarts",
    )
