"""Backward elimination of column groups by their exact prices.

legend  P   inverse of the kept part of the Gram, H_SS^{-1}            (k, k)
        A   V_S^T D V_S, energy of the current weight                  (k, k)
        g   columns of a group

The price of a group, tr([P_gg]^{-1} A_gg), is by how much the objective rises when it is removed and the other columns
are refitted. Prices of successive removals therefore add up to the objective. The price is that of the optimal brain
surgeon (Hassibi and Stork, NIPS 1992), for groups as in OSSCAR (Meng et al., ICML 2024, arXiv 2403.12983). OSSCAR
removes ten columns at a time by prices that are not updated in between; the default here is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.solvers.group_problem import GroupProblem, Selection, cholesky, group_indices
from alps.solvers.sweep_tableau import SweepTableau

# A tableau is built again when its relative error exceeds the tolerance; it is measured after this number of pivots.
_TOLERANCE = 1e-8
_CHECK_INTERVAL = 512


@dataclass(frozen=True, eq=False)
class Elimination(Selection):
    """Groups that are kept after an elimination.

    Attributes:
        removed: indices of the removed groups in the order of their removal, shape (groups - keep,), int64.
        prices: increase of the objective by each of these removals, float64.
    """

    removed: Tensor
    prices: Tensor


def eliminate(
    problem: GroupProblem, keep: int, *, batch: int = 1, protected: Sequence[int] | Tensor = (), block: int = 64
) -> Elimination:
    """Remove the cheapest group until `keep` are left; among equal prices the lowest index is removed first.

    Args:
        problem: the layer problem.
        keep: number of groups to keep.
        batch: number of groups that are removed at a time, by prices that are not updated in between. The recorded
            prices are exact for any value.
        protected: indices of groups that are never removed.
        block: number of rank-one updates that are held before they are applied by matrix products.

    Raises:
        ValueError: if `keep` is less than the number of protected groups, or more than there are.
        SolveFailed: if the Gram is not positive definite, or too close to it for float64.
    """
    barred = torch.zeros(problem.groups, dtype=torch.bool, device=problem.hessian.device)
    barred[group_indices(problem, protected)] = True
    if not max(int(barred.sum()), 1) <= keep <= problem.groups:
        raise ValueError(f"{keep} of {problem.groups} groups cannot be kept with {int(barred.sum())} protected ones.")
    tableau = full_tableau(problem, block=block)
    count = problem.groups - keep
    removed, prices = torch.empty(count, dtype=torch.int64, device=barred.device), problem.hessian.new_empty(count)
    next_check = _CHECK_INTERVAL
    for start in range(0, count, batch):
        if start * problem.group >= next_check:
            next_check += _CHECK_INTERVAL
            tableau.restore_accuracy(_TOLERANCE)
        current = group_prices(tableau).masked_fill_(barred, torch.inf)
        chosen = cheapest(current, min(batch, count - start))
        for position, group in enumerate(torch.split(chosen, 1), start):
            removed[position : position + 1] = group
            prices[position : position + 1] = remove_group(tableau, group)
    if not bool(prices.isfinite().all()):
        raise SolveFailed("the Gram is too ill-conditioned for an elimination: raise the damping or use more samples")
    return Elimination(problem.others(removed), float(prices.sum()), removed, prices)


def full_tableau(problem: GroupProblem, *, block: int = 64) -> SweepTableau:
    """Build the tableau in which all columns are kept."""
    every_column = torch.ones(len(problem.hessian), dtype=torch.bool, device=problem.hessian.device)
    return SweepTableau(problem, every_column, block=block)


def group_prices(tableau: SweepTableau) -> Tensor:
    """Return the price tr([P_gg]^{-1} A_gg) of every kept group, infinite for the others, shape (groups,)."""
    problem = tableau.problem
    if problem.group == 1:
        return tableau.prices().masked_fill_(~tableau.kept, torch.inf)
    groups = tableau.kept[:: problem.group].nonzero().flatten()
    prices = tableau.prices().new_full((problem.groups,), torch.inf)
    prices[groups] = removal_costs(tableau, problem.columns(groups).view(-1, problem.group))
    return prices


def removal_costs(tableau: SweepTableau, columns: Tensor) -> Tensor:
    """Return by how much the objective rises when a whole set of kept columns is removed, shape (sets,).

    Args:
        tableau: of the current selection.
        columns: indices of the kept columns of every set, shape (sets, size).
    """
    tableau.flush()
    chunk = max(2**24 // columns.shape[1] ** 2, 1)
    costs = []
    for sets in torch.split(columns, chunk):
        M, A = tableau.submatrices(sets, sets)
        costs.append(torch.cholesky_solve(A, cholesky(-M)).diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min_(0.0))
    return torch.cat(costs)


def cheapest(prices: Tensor, count: int) -> Tensor:
    """Return the indices of the lowest prices, the lowest index first among equal ones, shape (count,)."""
    if count == 1:
        return prices.argmin(dim=0, keepdim=True)
    return prices.sort(stable=True).indices[:count]


def remove_group(tableau: SweepTableau, group: Tensor) -> Tensor:
    """Remove one kept group, index of shape (1,), and return its price, shape (1,)."""
    columns = torch.split(tableau.problem.columns(group), 1)
    return torch.stack([tableau.pivot(column) for column in columns]).sum(dim=0)
