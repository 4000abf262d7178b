"""Problem of structured pruning: which columns of a linear map to keep, and their refitted values.

legend  H   damped Gram of the inputs, positive definite                           (n, n)
        W   target: the minimiser without a constraint, W* in the documentation    (m, n)
        D   row weights; ones if there are none                                    (m,)
        S   kept columns, k of them; R are the others
        V   weight that is supported on S                                          (m, n)
        L   Cholesky factor of H_SS                                                (k, k)

    minimise over S and V:  ||D^{1/2} (V - W)||_H^2 = tr(D (V - W) H (V - W)^T)

For a given S the rows are independent, so D does not matter: V_S = (W H)_S H_SS^{-1} = W_S + W_R H_RS H_SS^{-1}. The
objective is then tr(D W_R Q W_R^T) with the Schur complement Q = H_RR - H_RS H_SS^{-1} H_SR. It contains no difference
of large energies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.errors import SolveFailed


@dataclass(frozen=True, eq=False)
class GroupProblem:
    """Least-squares problem whose columns are kept or removed in groups.

    Damping towards the dense weights and a dense target are in `hessian` and `target` already: with the damping lam,
    the dense weight W_0 and any target outputs Y, H = X^T X + lam I and W* = (Y^T X + lam W_0) H^{-1}.

    Attributes:
        hessian: damped Gram, weighted by token if wanted, shape (n, n), float64.
        target: W*, shape (m, n), any float dtype.
        row_weights: positive weight of every output, shape (m,), None for ones.
        group: number of consecutive columns that are removed together, such as the dimension of a head.
        dead: True for columns whose input was zero on every token, shape (n,), None for none. Their removal costs
            nothing, although the damping would give it a price. A kept one keeps its target value.
    """

    hessian: Tensor
    target: Tensor
    row_weights: Tensor | None = None
    group: int = 1
    dead: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            ValueError: if shapes do not match or the Gram is not in float64.
            SolveFailed: if a value is not finite.
        """
        n = self.hessian.shape[-1]
        if self.hessian.shape != (n, n) or self.target.ndim != 2 or self.target.shape[1] != n or n % self.group:
            shapes = f"{tuple(self.hessian.shape)} and {tuple(self.target.shape)}"
            raise ValueError(f"A Gram and a target of the shapes {shapes} have no groups of {self.group} columns.")
        if self.hessian.dtype != torch.float64:
            raise ValueError(f"The Gram must be float64, not {self.hessian.dtype}.")
        if not bool(self.hessian.isfinite().all() & self.target.isfinite().all()):
            raise SolveFailed(
                "the Gram or the weights hold NaN or infinite values: the calibration inputs are unusable"
            )

    @property
    def groups(self) -> int:
        """Number of groups of columns."""
        return self.hessian.shape[0] // self.group

    def columns(self, groups: Tensor) -> Tensor:
        """Return the columns of some groups, in the order of the groups; groups are indices, shape (count,)."""
        offsets = torch.arange(self.group, device=groups.device)
        return (groups[:, None] * self.group + offsets).flatten()

    def others(self, groups: Tensor) -> Tensor:
        """Return the indices of all other groups, ascending."""
        mask = torch.ones(self.groups, dtype=torch.bool, device=self.hessian.device)
        mask[groups] = False
        return mask.nonzero().flatten()

    def priced_target(self) -> Tensor:
        """Return the target in float64, zero in dead columns so that their removal costs nothing, shape (m, n)."""
        target = self.target.double()
        return target if self.dead is None else target.masked_fill(self.dead, 0.0)

    def weigh_rows(self, matrix: Tensor) -> Tensor:
        """Return D times a matrix, shape (m, any)."""
        return matrix if self.row_weights is None else matrix * self.row_weights.double()[:, None]


@dataclass(frozen=True, eq=False)
class Selection:
    """Groups that are kept.

    Attributes:
        kept: indices of the groups, ascending, shape (keep,), int64.
        objective: ||D^{1/2} (V - W*)||_H^2 after a refit.
    """

    kept: Tensor
    objective: float


def refit(problem: GroupProblem, kept: Tensor) -> Tensor:
    """Compute the optimal weight on the kept groups, V_S = W_S + W_R H_RS H_SS^{-1}.

    Args:
        problem: the layer problem.
        kept: indices of the kept groups, ascending.

    Returns:
        V_S, shape (m, number of kept columns), float64.

    Raises:
        SolveFailed: if H_SS is not positive definite.
    """
    S, R = problem.columns(kept), problem.columns(problem.others(kept))
    W = problem.target.double()
    L = cholesky(problem.hessian[S[:, None], S])
    correlation = W[:, R] @ problem.hessian[R[:, None], S]
    return W[:, S] + torch.cholesky_solve(correlation.T, L).T


def objective(problem: GroupProblem, kept: Tensor) -> float:
    """Compute ||D^{1/2} (V - W*)||_H^2 for the optimal weight on the kept groups.

    Args:
        problem: the layer problem.
        kept: indices of the kept groups, ascending.

    Raises:
        SolveFailed: if H_SS is not positive definite.
    """
    H, S, R = problem.hessian, problem.columns(kept), problem.columns(problem.others(kept))
    K = torch.linalg.solve_triangular(cholesky(H[S[:, None], S]), H[S[:, None], R], upper=False)
    schur = H[R[:, None], R] - K.T @ K
    W = problem.priced_target()[:, R]
    return float(((W @ schur) * problem.weigh_rows(W)).sum())


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a matrix, or of each of a stack of matrices.

    Raises:
        SolveFailed: if it is not positive definite.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool((failed != 0).any()):
        raise SolveFailed(
            "the Gram of the kept columns is not positive definite: raise the damping or use more samples"
        )
    return factor


def group_indices(problem: GroupProblem, groups: Sequence[int] | Tensor) -> Tensor:
    """Return indices of groups as an int64 tensor on the problem's device."""
    return torch.as_tensor(groups, dtype=torch.int64, device=problem.hessian.device)
