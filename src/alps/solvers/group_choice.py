"""Choice of groups within classes, such as query heads within their key-value group: exact where there are few.

legend  P, A   of the tableau in which all columns are kept: H^{-1} and W^T D W        (n, n)
        R      columns of a set of removed groups

The objective of a set is the price of removing it at once, tr([P_RR]^{-1} A_RR). All sets are compared if they are few
enough; otherwise an elimination within the classes is followed by exchanges within them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from alps.solvers.group_elimination import cheapest, full_tableau, group_prices, removal_costs, remove_group
from alps.solvers.group_problem import GroupProblem, Selection, group_indices
from alps.solvers.sweep_tableau import SweepTableau

# Sets are enumerated up to this number, and up to these flops: a minute on one CPU core.
_MAX_SETS = 100_000
_MAX_FLOPS = 1e12
_LEAST_GAIN = 1e-9


def choose_groups(
    problem: GroupProblem, keep: int, *, classes: Sequence[int] | Tensor | None = None, exact: bool | None = None
) -> Selection:
    """Choose the groups to keep, the same number in every class; among equal sets the first in lexical order.

    Args:
        problem: the layer problem.
        keep: number of groups to keep in every class.
        classes: class of every group, shape (groups,); None if all are in one.
        exact: whether to compare all sets; None if their number and their cost allow it.

    Raises:
        ValueError: if a class has fewer than `keep` groups, or `keep` is less than one.
        SolveFailed: if the Gram is not positive definite.
    """
    labels = [0] * problem.groups if classes is None else group_indices(problem, classes).tolist()
    members = [[i for i, label in enumerate(labels) if label == each] for each in dict.fromkeys(labels)]
    if len(labels) != problem.groups or not 1 <= keep <= min(map(len, members)):
        sizes = ", ".join(str(len(groups)) for groups in members)
        raise ValueError(
            f"{keep} groups cannot be kept in each class of {problem.groups} groups, of the sizes {sizes}."
        )
    tableau = full_tableau(problem)
    if all(len(groups) == keep for groups in members):
        return Selection(torch.arange(problem.groups, device=problem.hessian.device), 0.0)
    if _is_affordable(problem, members, keep) if exact is None else exact:
        return _best(tableau, _all_sets(members, keep))
    removed = _greedy(full_tableau(problem), members, keep)
    best = _best(tableau, [removed])
    while True:
        removed = problem.others(best.kept).tolist()
        exchanged = _best(tableau, _neighbours(removed, members))
        if not exchanged.objective < best.objective * (1 - _LEAST_GAIN):
            return best
        best = exchanged


def _is_affordable(problem: GroupProblem, members: list[list[int]], keep: int) -> bool:
    sets = math.prod(math.comb(len(groups), keep) for groups in members)
    size = problem.group * sum(len(groups) - keep for groups in members)
    return sets <= _MAX_SETS and sets * 4 / 3 * size**3 <= _MAX_FLOPS


def _all_sets(members: list[list[int]], keep: int) -> Iterator[list[int]]:
    """Yield every set of removed groups that leaves `keep` in each class."""
    for parts in itertools.product(*(itertools.combinations(groups, len(groups) - keep) for groups in members)):
        yield [group for part in parts for group in part]


def _neighbours(removed: list[int], members: list[list[int]]) -> Iterator[list[int]]:
    """Yield every set of removed groups that differs in one exchange within a class."""
    for groups in members:
        inside = [group for group in groups if group in removed]
        outside = [group for group in groups if group not in removed]
        for p, q in itertools.product(inside, outside):
            yield [q if group == p else group for group in removed]


def _best(tableau: SweepTableau, sets: Iterable[list[int]]) -> Selection:
    """Return what the cheapest of some sets of removed groups leaves, and its price."""
    removed = torch.tensor(list(sets), device=tableau.kept.device)
    columns = tableau.problem.columns(removed.flatten()).view(len(removed), -1)
    costs = removal_costs(tableau, columns)
    best = int(costs.argmin())
    return Selection(tableau.problem.others(removed[best]), float(costs[best]))


def _greedy(tableau: SweepTableau, members: list[list[int]], keep: int) -> list[int]:
    """Remove the cheapest group of the classes that hold more than `keep`, one at a time; changes the tableau."""
    left = [list(groups) for groups in members]
    removed: list[int] = []
    while any(len(groups) > keep for groups in left):
        barred = [group for groups in left if len(groups) == keep for group in groups]
        prices = group_prices(tableau)
        prices[group_indices(tableau.problem, barred)] = torch.inf
        group = cheapest(prices, 1)
        remove_group(tableau, group)
        removed.append(int(group))
        left = [[other for other in groups if other != removed[-1]] for groups in left]
    return removed
