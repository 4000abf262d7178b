"""Local search on a column selection: exchange a kept column for a removed one while the objective falls.

legend  H, D   as in `group_problem.py`; M, A as in `sweep_tableau.py`
        p, q   a kept and a removed column
        b      M_pq / P_pp with P_pp = -M_pp: what r_q gains of the removed weight V_p

Exact change of the objective by the exchange, all other columns refitted:

    A_pp / P_pp - (A_qq + 2 b A_pq + b^2 A_pp) / (M_qq + b M_pq)

The first term is the price of p. The second is the gain of q once p is removed. OSSCAR (arXiv 2403.12983) searches by
such exchanges, too; here all pairs are priced, so that the result is optimal among all single exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.solvers.group_elimination import cheapest
from alps.solvers.group_problem import GroupProblem, Selection, group_indices, objective
from alps.solvers.sweep_tableau import SweepTableau

# The relative decrease of the objective that counts as one: above rounding, which could exchange for ever.
_LEAST_GAIN = 1e-7
_PAIRS_PER_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Exchange(Selection):
    """Columns that are kept after a local search.

    Attributes:
        before: objective of the selection that the search started from.
        swaps: number of exchanges.
    """

    before: float
    swaps: int


def improve_by_swaps(
    problem: GroupProblem,
    kept: Tensor,
    *,
    candidates: int = 64,
    limit: int | None = None,
    protected: Sequence[int] | Tensor = (),
) -> Exchange:
    """Exchange kept for removed columns until no exchange lowers the objective.

    All pairs are priced for the columns of the best ones; these are exchanged best first, at exact prices, until none
    gains; then all pairs are priced again.

    Args:
        problem: the layer problem, with groups of one column.
        kept: indices of the kept columns, ascending.
        candidates: number of kept columns, and of removed ones, that are exchanged between two pricings of all pairs.
        limit: largest number of exchanges; None for the number of kept columns.
        protected: indices of columns that stay kept.

    Raises:
        ValueError: if the groups have several columns.
        SolveFailed: if the Gram is not positive definite.
    """
    if problem.group != 1:
        raise ValueError("Columns are exchanged one by one: use choose_groups for groups of several.")
    before = objective(problem, kept)
    mask = torch.zeros(problem.groups, dtype=torch.bool, device=problem.hessian.device)
    mask[kept] = True
    search = _Search(SweepTableau(problem, mask), group_indices(problem, protected), _LEAST_GAIN * before)
    limit = len(kept) if limit is None else limit
    swaps = 0
    while swaps < limit and (pairs := search.best_pairs(candidates)):
        swaps += search.exchange(*pairs, limit - swaps)
    improved = search.tableau.kept.nonzero().flatten()
    after = objective(problem, improved)
    # Rounding could let the tableau promise what the recomputed objective does not hold.
    return Exchange(improved, after, before, swaps) if after < before else Exchange(kept, before, before, 0)


@dataclass
class _Search:
    """A tableau, and the columns that stay kept."""

    tableau: SweepTableau
    protected: Tensor
    least_gain: float

    def best_pairs(self, candidates: int) -> tuple[Tensor, Tensor] | None:
        """Price all pairs; return the kept and the removed columns of the best ones, None if none gains."""
        movable = self.tableau.kept.clone()
        movable[self.protected] = False
        ps, qs = movable.nonzero().flatten(), (~self.tableau.kept).nonzero().flatten()
        if not len(ps) or not len(qs):
            return None
        self.tableau.flush()
        chunks = torch.split(ps, max(_PAIRS_PER_CHUNK // len(qs), 1))
        best = [self.changes(chunk, qs).min(dim=1) for chunk in chunks]
        change, partner = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
        order = cheapest(change, min(candidates, len(ps)))
        order = order[change[order] < -self.least_gain]
        return (ps[order], qs[torch.unique(partner[order])]) if len(order) else None

    def changes(self, ps: Tensor, qs: Tensor) -> Tensor:
        """Return the exact change of the objective by every exchange, shape (kept, removed)."""
        tableau = self.tableau
        M, A = tableau.submatrices(ps, qs)
        A_p, A_q = tableau.energy_diagonal[ps][:, None], tableau.energy_diagonal[qs]
        P_p, Q_q = -tableau.sweep_diagonal[ps][:, None], tableau.sweep_diagonal[qs]
        b = M / P_p
        gain = torch.addcmul(A_q, b, A.mul_(2).addcmul_(b, A_p))
        return A_p / P_p - gain / torch.addcmul(Q_q, b, M)

    def exchange(self, ps: Tensor, qs: Tensor, limit: int) -> int:
        """Exchange the best pair among some kept and removed columns until none gains; return the number."""
        ps, qs = ps.clone(), qs.clone()
        for swaps in range(limit):
            changes = self.changes(ps, qs)
            best = int(changes.argmin())
            i, j = divmod(best, len(qs))
            if not float(changes[i, j]) < -self.least_gain:
                return swaps
            p, q = ps[i : i + 1].clone(), qs[j : j + 1].clone()
            self.tableau.pivot(p)
            self.tableau.pivot(q)
            ps[i : i + 1], qs[j : j + 1] = q, p
        return limit
