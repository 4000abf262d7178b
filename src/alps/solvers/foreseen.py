"""Inverses that several processes need at the same time: each makes one that the schedule of the penalty may come to.

legend  H    Hessian with unit diagonal             (in, in)
        rho  penalty                                scalar
        I_r  (H + rho I)^{-1}, 4/3 in^3 operations  (in, in)
Rows that are split over processes share every I_r, and the next rho is known only when the support has been looked at.
But it is one of few: a growth factor of the schedule times this one, hardly ever a larger factor than the last. So
in a round every process makes another I_r, of the likeliest penalties from here on, and those that are met are sent by
who has them. Between one process and eight, 11 inverses of a site become 2 rounds (docs/scaling.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.solvers.admm import AdmmSettings
from alps.solvers.hessian import ScaledHessian, indefinite
from alps.solvers.row_parallel import Rows

# How likely the next check takes the growth factor of the last one again, by how often it was taken in a row; a row for
# each factor, the largest first. As it was on sites of SmolLM2-135M; where it is otherwise, rounds are more.
_STAYS = (
    (0.97, 0.97, 0.97, 0.85, 0.8, 0.75, 0.6, 0.4, 0.2),
    (0.8, 0.6, 0.4, 0.2),
    (0.8, 0.6, 0.3, 0.1),
)
# Of the times that it does not: how often a factor is left out, each.
_LEAVES_OUT = 0.08
# Most schedules: so many growths by the largest factor, the next, and the last.
_USUAL = (7, 2, 1)


class SharedHessian(ScaledHessian):
    """A Hessian that all processes hold, and whose inverses they make by turns.

    All of them ask for the same inverses in the same order, and get the same bits.
    """

    def __init__(self, state: ScaledHessian, rows: Rows, settings: AdmmSettings) -> None:
        super().__init__(state.matrix, state.scale, state.damping, state.notes, state._inverses)
        self._rows, self._factors = rows, [factor for _, factor in settings.growth]
        # Penalties of this round, by who makes their inverse; this process's own; and whose failed.
        self._round: list[float] = []
        self._mine: Tensor | None = None
        self._failed: list[bool] = []
        self._last, self._stage, self._times = 0.0, 0, 0
        # Who has kept an inverse takes no part in sending it: all keep the same, as many as fit in every process.
        rooms = torch.zeros(rows.size, dtype=torch.int64)
        rooms[rows.rank] = super()._room()
        self._least_room = int(rows.total(rooms).min())

    def inverse(self, rho: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `ScaledHessian`; a message, and a round of work where nobody has foreseen this penalty.

        Raises:
            SolveFailed: in all processes, when the matrix is not positive definite.
        """
        self._follow(rho)
        if (rho, dtype) in self._inverses:
            return self._inverses[rho, dtype]
        if rho not in self._round:
            self._make(rho, dtype)
        owner = self._round.index(rho)
        if self._failed[owner]:
            raise indefinite(rho)
        mine = self._mine if owner == self._rows.rank else None
        inverse = torch.empty_like(self.matrix, dtype=dtype) if mine is None else mine
        self._rows.send(inverse, owner)
        self._keep(rho, inverse)
        return inverse

    def _room(self) -> int:
        return self._least_room

    def _follow(self, rho: float) -> None:
        """Where in the schedule this penalty is."""
        taken = [stage for stage, factor in enumerate(self._factors) if self._last * factor == rho]
        if rho != self._last:
            stage = taken[0] if taken else 0
            self._times = self._times + 1 if taken and stage == self._stage else int(bool(taken))
            self._stage, self._last = stage, rho

    def _make(self, rho: float, dtype: torch.dtype) -> None:
        self._mine = None  # first: what is let go makes room
        # What an earlier site of the input has left is there.
        kept = [penalty for penalty, kind in self._inverses if kind is dtype]
        likely = foresee(rho, self._stage, self._times, self._factors, self._rows.size + len(kept))
        self._round = [penalty for penalty in likely if penalty not in kept][: self._rows.size]
        failed = torch.zeros(self._rows.size, dtype=torch.int64)
        if self._rows.rank < len(self._round):
            try:
                self._mine = self._fresh(self._round[self._rows.rank], dtype)
            except SolveFailed:
                failed[self._rows.rank] = 1
        self._failed = [bool(one) for one in self._rows.total(failed)]


def rounds(size: int) -> int:
    """Rounds that a usual site takes in so many processes; as many as inverses in one."""
    settings = AdmmSettings()
    factors = [factor for _, factor in settings.growth]
    path = [(settings.rho, 0, 0)]
    for stage, count in enumerate(_USUAL):
        for times in range(1, count + 1):
            path.append((path[-1][0] * factors[stage], stage, times))
    found, made = 0, list[float]()
    for rho, stage, times in path:
        if rho not in made:
            found, made = found + 1, foresee(rho, stage, times, factors, size)
    return found


def foresee(rho: float, stage: int, times: int, factors: Sequence[float], count: int) -> list[float]:
    """The penalties that a schedule will most likely come to, itself first.

    Args:
        rho: the penalty at hand.
        stage: which of the `factors` led to it, 0 at the beginning.
        times: how often that was taken in a row; 0 at the beginning.
        factors: of growth, the largest first.
        count: how many are wanted; fewer are found where the schedule ends.
    """
    found: dict[float, None] = {}
    heap, number = [(-1.0, 0, rho, stage, times)], 0
    while heap and len(found) < count:
        chance, _, penalty, stage, times = heapq.heappop(heap)
        if penalty in found:
            continue
        found[penalty] = None
        row = _STAYS[min(stage, len(_STAYS) - 1)]
        stays = row[min(times, len(row) - 1)]
        for next_stage in range(stage, len(factors)):
            skipped = next_stage - stage - 1
            share = stays if skipped < 0 else (1 - stays) * (_LEAVES_OUT**skipped) * (1 - _LEAVES_OUT)
            number += 1
            again = times + 1 if next_stage == stage else 1
            heapq.heappush(heap, (chance * share, number, penalty * factors[next_stage], next_stage, again))
    return list(found)
