"""Small problems of column selection, and their objective by dense least squares without any inverse of a Gram."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from alps.solvers.group_problem import GroupProblem


def normal(seed: int, *shape: int) -> Tensor:
    """Return seeded standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_columns(seed: int, n: int, m: int, *, group: int = 1, factors: int | None = None) -> GroupProblem:
    """Return a damped problem with row weights, whose inputs share a few strong factors and differ in size."""
    factors = factors or max(n // 3, 1)
    inputs = normal(seed, 4 * n, factors) @ normal(seed + 1, factors, n) + 0.3 * normal(seed + 2, 4 * n, n)
    inputs *= torch.exp(0.5 * normal(seed + 3, n))
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return GroupProblem(hessian, normal(seed + 4, m, n), torch.exp(normal(seed + 5, m)), group)


def direct_objective(problem: GroupProblem, groups: Sequence[int] | Tensor) -> float:
    """Return the objective for some kept groups by least squares on a square root of the Gram, in float64."""
    kept = problem.columns(torch.as_tensor(groups, dtype=torch.int64))
    root = torch.linalg.cholesky(problem.hessian).T
    weights = torch.ones(len(problem.target)) if problem.row_weights is None else problem.row_weights
    outputs = root @ (problem.target.double() * weights.double().sqrt()[:, None]).T
    values = torch.linalg.lstsq(root[:, kept], outputs, driver="gelsd").solution
    return float((root[:, kept] @ values - outputs).square().sum())


def optimum(problem: GroupProblem, keep: int) -> tuple[tuple[int, ...], float]:
    """Return the best set of kept groups and its objective by trying all, at first without the kept columns.

    The objective of a removed set R is tr([P_RR]^{-1} A_RR), which is quick enough to try hundreds of sets.
    """
    inverse = torch.linalg.inv(problem.hessian)
    target = problem.target.double()
    energy = target.T @ (target if problem.row_weights is None else target * problem.row_weights[:, None])
    sets = list(itertools.combinations(range(problem.groups), problem.groups - keep))
    R = torch.stack([problem.columns(torch.tensor(removed)) for removed in sets])
    index = R[:, :, None], R[:, None, :]
    costs = torch.linalg.solve(inverse[index], energy[index]).diagonal(dim1=1, dim2=2).sum(dim=1)
    best = int(costs.argmin())
    return tuple(i for i in range(problem.groups) if i not in sets[best]), float(costs[best])
