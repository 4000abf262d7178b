"""Sweep tableau of a column selection: prices of removals, gains of additions and their low-rank updates.

legend  H, W, D, S, R   as in `group_problem.py`
        E   Diag(H)^{-1/2}, kept as a vector                                   (n,)
        P   H_SS^{-1}                                                          (k, k)
        B   P H_SR                                                             (k, n-k)
        Q   Schur complement H_RR - H_RS P H_SR                                (n-k, n-k)
        M   [[-P, B], [B^T, Q]], the swept H                                   (n, n)
        U   [V_S, r_R]: weights of kept, residuals (W - V) H of others         (m, n)
        A   U^T D U                                                            (n, n)

Removing a column p of S raises the objective by A_pp / P_pp; adding q of R lowers it by A_qq / Q_qq. Both are one pivot
k of the symmetric sweep operator (Goodnight, The American Statistician 33(3), 1979). With d = M_kk, v = M_k except for
v_k = d - sign(d), and g = v / d:

    M <- M - v g^T, except for M_kk = -1 / d        U <- U - U_k g^T        A <- A - g u^T - u g^T

where u = A_k - A_kk g / 2. The outputs (m) occur in A only when it is built, so that a pivot costs O(n^2) for any m.
Pivots are held as factors of low rank: one pivot then costs O(n b) for b held ones, and the diagonals are exact at any
time. After `block` pivots they are added to M and A by three matrix products.

All matrices are those of the problem with a unit diagonal, E H E and W E^{-1}. Prices do not depend on the scale of a
column, but rounding would: in M_kj - v_k g_j it grows with |d|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alps.solvers.group_problem import GroupProblem, cholesky

_BLOCK = 64


class SweepTableau:
    """The matrices M and A of a selection of columns, with pivots that are applied in blocks.

    Attributes:
        problem: the layer problem; groups play no role here.
        kept: True for the columns in S, shape (n,).
        scale: E, shape (n,).
        sweep_diagonal: diagonal of M, shape (n,).
        energy_diagonal: diagonal of A, shape (n,).
    """

    def __init__(self, problem: GroupProblem, kept: Tensor, *, block: int = _BLOCK) -> None:
        """Build the tableau from scratch: about n^3 + 2 m n^2 flops.

        Args:
            problem: the layer problem.
            kept: True for the columns in S, shape (n,).
            block: largest number of pivots that are held as factors.

        Raises:
            SolveFailed: if H_SS is not positive definite.
        """
        self.problem = problem
        self._shape = (block, len(kept))
        self._build(kept.clone())

    def _build(self, kept: Tensor) -> None:
        H, W = self.problem.hessian, self.problem.priced_target()
        S, R = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        inverse = torch.cholesky_inverse(cholesky(H if len(R) == 0 else H[S[:, None], S]))
        if len(R) == 0:
            self._M, U = inverse.neg_(), W
        else:
            B = inverse @ H[S[:, None], R]
            schur = H[R[:, None], R] - H[R[:, None], S] @ B
            self._M = torch.empty_like(H)
            self._M[S[:, None], S] = inverse.neg_()
            self._M[S[:, None], R] = B
            self._M[R[:, None], S] = B.T
            self._M[R[:, None], R] = schur
            U = torch.empty_like(W)
            U[:, S] = W[:, S] + W[:, R] @ B.T
            U[:, R] = W[:, R] @ schur
        self.scale = H.diagonal().rsqrt()
        factors = torch.where(kept, 1 / self.scale, self.scale)
        self._M.mul_(factors).mul_(factors[:, None])
        U = U * factors
        self._A = self.problem.weigh_rows(U).T @ U
        self._v, self._g, self._u = (H.new_empty(self._shape) for _ in range(3))
        self._held = 0
        self.kept = kept
        self.sweep_diagonal = self._M.diagonal().clone()
        self.energy_diagonal = self._A.diagonal().clone()

    def prices(self) -> Tensor:
        """Return by how much each pivot changes the objective in size, shape (n,).

        It is the price of removal for a kept column, and the gain of adding for another one.
        """
        return (self.energy_diagonal / self.sweep_diagonal.abs()).clamp_min_(0.0)

    def pivot(self, column: Tensor) -> Tensor:
        """Remove a kept column or add another one; return its price or gain, shape (1,).

        Args:
            column: its index, shape (1,), int64.
        """
        if self._held == len(self._v):
            self.flush()
        i = self._held
        d, alpha = self.sweep_diagonal[column], self.energy_diagonal[column]
        v, a = self._M.index_select(0, column).flatten(), self._A.index_select(0, column).flatten()
        v.addmv_(self._g[:i].T, self._v[:i, column].flatten(), alpha=-1)
        a.addmv_(self._u[:i].T, self._g[:i, column].flatten(), alpha=-1)
        a.addmv_(self._g[:i].T, self._u[:i, column].flatten(), alpha=-1)
        v[column] = d - d.sign()
        a[column] = alpha
        g = v / d
        u = torch.addcmul(a, g, alpha, value=-0.5)
        self._v[i], self._g[i], self._u[i] = v, g, u
        self._held += 1
        self.sweep_diagonal.addcmul_(v, g, value=-1)
        self.sweep_diagonal[column] = -1 / d
        self.energy_diagonal.addcmul_(g, u, value=-2)
        self.energy_diagonal[column] = alpha / d.square()
        self.kept[column] = ~self.kept[column]
        return (alpha / d.abs()).clamp_min_(0.0)

    def flush(self) -> None:
        """Add the held pivots to M and A."""
        if not self._held:
            return
        v, g, u = (factor[: self._held] for factor in (self._v, self._g, self._u))
        self._M.addmm_(v.T, g, alpha=-1)
        self._A.addmm_(g.T, u, alpha=-1).addmm_(u.T, g, alpha=-1)
        self._M.diagonal().copy_(self.sweep_diagonal)
        self._A.diagonal().copy_(self.energy_diagonal)
        self._held = 0

    def submatrices(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of M and A at some rows and columns, each of shape (rows, columns).

        Args:
            rows: indices, shape (rows,); after a flush also stacks of them, shape (sets, rows).
            columns: indices, shape (columns,) or (sets, columns).
        """
        index = rows[..., :, None], columns[..., None, :]
        M, A = self._M[index], self._A[index]
        if self._held:
            v, g, u = (factor[: self._held] for factor in (self._v, self._g, self._u))
            M.addmm_(v[:, rows].T, g[:, columns], alpha=-1)
            A.addmm_(g[:, rows].T, u[:, columns], alpha=-1).addmm_(u[:, rows].T, g[:, columns], alpha=-1)
        return M, A

    def restore_accuracy(self, tolerance: float) -> None:
        """Build the tableau again if its drift exceeds a tolerance."""
        if not self.drift() <= tolerance:
            self._build(self.kept)

    def drift(self) -> float:
        """Measure the relative error of M and A on one fixed random vector, for O(n^2 + m n) flops.

        M is checked by what it inverts: for y = H x it maps (y_S, x_R) to (-x_S, y_R). A is checked as U^T D U, where
        U = W H T with T = [[P, -B], [0, I]].
        """
        self.flush()
        H, M, E, W, S = self.problem.hessian, self._M, self.scale, self.problem.priced_target(), self.kept
        x = torch.randn(len(H), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(H.device)
        y = E * (H @ (E * x))
        expected, actual = torch.where(S, -x, y), M @ torch.where(S, y, x)
        outputs = W @ (H @ (E * torch.where(S, -(M @ x), x)))
        z = E * (H @ (W.T @ self.problem.weigh_rows(outputs[:, None]).flatten()))
        energy = torch.where(S, -(M @ (z * S)), z - M @ (z * S))
        pairs = [(a[part], b[part]) for a, b in ((actual, expected), (self._A @ x, energy)) for part in (S, ~S)]
        return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)
