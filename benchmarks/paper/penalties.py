"""The splitting of ALPS under its own schedule and under penalties that never grow, watched as it goes.

legend  W    weights, free of the pattern           (out, in)
        D    weights, under the pattern             (out, in)
        rho  penalty on ||W - D||^2                 scalar
        s    entries by which D's support changed   scalar
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from alps.core.statistics import relative_errors
from alps.solvers import admm
from alps.solvers.admm import AdmmSettings, PlainSteps
from alps.solvers.hessian import scaled
from alps.solvers.patterns import Pattern, keep_largest
from alps.solvers.topk import apply_mask
from layers import Problem, exact_weights


@dataclass(frozen=True)
class Look:
    """State after one iteration.

    Attributes:
        error: relative error of D.
        pruned_error: relative error of W with all but its largest entries set to zero.
        change: s of that iteration over all entries of the matrix; None where the loop has ended before.
    """

    error: float
    pruned_error: float
    change: float | None


@dataclass(frozen=True)
class Course:
    """A run of the splitting.

    Attributes:
        name: `schedule`, or `rho` and its value.
        looks: after the iterations asked for; everything rests where the loop has ended.
        optimal: relative error of the optimal weights on the last support.
        end: how the loop ended.
    """

    name: str
    looks: list[Look]
    optimal: float
    end: str


class Watched(PlainSteps):
    """The steps as published, in float32, with a look after some iterations.

    Iterations count from the beginning, restarts included, as the schedule counts them.
    """

    def __init__(self, problem: Problem, pattern: Pattern, wanted: Sequence[int]) -> None:
        self._problem, self._wanted = problem, set(wanted)
        weight, stats = problem
        hessian = scaled(stats, 0.01)
        dense = weight / hessian.scale
        super().__init__(hessian, dense, dense @ hessian.matrix, pattern)
        self.iteration, self.looks = 0, dict[int, Look]()

    def step(self, rho: float) -> None:
        before = self.mask
        super().step(rho)
        self.iteration += 1
        if self.iteration in self._wanted:
            change = int(torch.count_nonzero(self.mask ^ before)) / self.mask.numel()
            self.looks[self.iteration] = replace(self.look(), change=change)

    def look(self) -> Look:
        """Both errors as they stand, in the coordinates of the weight."""
        pruned = apply_mask(self._W, keep_largest(self._W.abs(), self._pattern))
        both = [one * self._hessian.scale for one in (self._D, pruned)]
        error, pruned_error = relative_errors(both, *self._problem)
        return Look(error, pruned_error, change=None)


def courses(problem: Problem, pattern: Pattern, iterations: Sequence[int], fixed: Sequence[float]) -> list[Course]:
    """The schedule's course, then that of every fixed penalty."""
    last = max(iterations)
    runs = {"schedule": replace(AdmmSettings(), max_iterations=last)}
    # Without a check of the support there is no growth, no restart, and no early end.
    runs |= {f"rho {rho:g}": AdmmSettings(rho=rho, check_every=last + 1, max_iterations=last) for rho in fixed}
    return [_course(name, settings, problem, pattern, iterations) for name, settings in runs.items()]


def _course(name: str, settings: AdmmSettings, problem: Problem, pattern: Pattern, iterations: Sequence[int]) -> Course:
    steps = Watched(problem, pattern, iterations)
    entries = problem[0].numel()
    result = admm.run(steps, entries - pattern.pruned_count(entries), settings)
    rest = steps.look()
    optimal = relative_errors([exact_weights(problem, result.mask)], *problem)[0]
    end = f"{result.status} after {result.iterations} iterations, {result.restarts} restarts"
    return Course(name, [steps.looks.get(t, rest) for t in iterations], optimal, end)
