"""The best exchanges inside rows, each row's other weights following along: a tableau over a few candidates of each.

legend  W    dense weight                                       (rows, in)
        H    Hessian with unit diagonal                         (in, in)
        D    pruned weight, supported on M                      (rows, in)
        M    support, True = kept                               (rows, in)
        free entries off M that may enter it                    (rows, in)
        R    residual (W - D) H                                 (rows, in)
        S    candidates: places to leave, then places to enter  (rows, c)
        F    kept places that are no candidates                 (rows, f)
        L    Cholesky factor of H on F                          (rows, f, f)
        V    L^{-1} (H_FS | R_F)                                (rows, f, c + 1)
        T    tableau of the row's error as a function of its candidates, F following along at its optimum
                                                                (rows, c + 1, c + 1)
T starts as the Schur complement (H_SS | R_S) - V^T V and is then swept on the kept candidates (sweep operator:
Goodnight, The American Statistician 33(3), 1979). For p kept and q pruned it holds, all kept weights being optimal,

        T_pp = -[(H_MM)^{-1}]_pp    T_qq, the curvature along q    T_pq, by how much p gives way to q
        T_pc = D_p                  T_qc = R_q                     (c, the last column)

so that the gain of every exchange, the refit of all other weights of the row included, is known in closed form:
(T_qc - T_pc T_pq / T_pp)^2 / (T_qq - T_pq^2 / T_pp) + T_pc^2 / T_pp. An exchange is two more sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.solvers.patterns import Pattern, SemiStructured

# Exchanges in a row before its candidates are chosen anew.
_MOST = 16


@dataclass
class Offers:
    """What single entries are worth to a row: the cheapest to give and its price, the best to take and its gain."""

    price: Tensor
    give: Tensor
    gain: Tensor
    take: Tensor


class Tableau:
    """The reduced problems of some rows; `sound` says which of them could be factorised."""

    def __init__(
        self,
        H: Tensor,
        d: Tensor,
        m: Tensor,
        free: Tensor,
        R: Tensor,
        leaving: Tensor,
        entering: Tensor,
        pattern: Pattern,
    ) -> None:
        self.k, self.S = leaving.shape[1], torch.cat([leaving, entering], dim=1)
        rows, c = self.S.shape
        # Places of the wrong kind, in rows that have too few of the right one, take no part.
        self.usable = torch.cat([m.gather(1, leaving), free.gather(1, entering)], dim=1)
        pairs = self.usable[:, : self.k, None] & self.usable[:, None, self.k :]
        if isinstance(base := pattern.base, SemiStructured):
            pairs &= (leaving // base.group)[:, :, None] == (entering // base.group)[:, None, :]
        self.pairs = pairs
        # Positions in S: first those of kept places, then those of pruned ones; an exchange swaps two of them.
        self.slots = torch.arange(c, device=d.device).repeat(rows, 1)
        self._eliminate(H, m.scatter(1, leaving, False), R)
        self.start = d.gather(1, self.S).mul_(self.usable)
        self._sweep_kept()

    def _eliminate(self, H: Tensor, fixed: Tensor, R: Tensor) -> None:
        f, c = int(fixed.sum(dim=1).max()), self.S.shape[1]
        self.F = fixed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :f]
        self.inside = fixed.gather(1, self.F).to(R.dtype)
        block = _block(H, self.F, self.F).mul_(self.inside[:, :, None]).mul_(self.inside[:, None, :])
        block.diagonal(dim1=1, dim2=2).fill_(1.0)
        self.L, failed = torch.linalg.cholesky_ex(block)
        del block
        right = torch.cat([_block(H, self.F, self.S), R.gather(1, self.F)[:, :, None]], dim=2)
        self.V = torch.linalg.solve_triangular(self.L, right.mul_(self.inside[:, :, None]), upper=False)
        T = R.new_zeros(len(R), c + 1, c + 1)
        T[:, :c, :c] = _block(H, self.S, self.S)
        T[:, :c, c] = T[:, c, :c] = R.gather(1, self.S)
        used = torch.cat([self.usable, self.usable.new_ones(len(R), 1)], dim=1).to(R.dtype)
        T.baddbmm_(self.V.mT, self.V, alpha=-1).mul_(used[:, :, None]).mul_(used[:, None, :])
        T.diagonal(dim1=1, dim2=2).add_(1 - used)
        self.T, self.sound = T, failed == 0

    def _sweep_kept(self) -> None:
        T, k, c = self.T, self.k, self.S.shape[1]
        # Up to here the last column is the residual at the current weights; the tableau is for the weights themselves.
        T[:, :c, c] += torch.bmm(T[:, :c, :c], self.start[:, :, None])[:, :, 0]
        T[:, c, :c] = T[:, :c, c]
        factor, failed = torch.linalg.cholesky_ex(T[:, :k, :k])
        self.sound &= failed == 0
        inverse = torch.cholesky_inverse(factor)
        across = torch.bmm(T[:, k:, :k], inverse)
        T[:, k:, k:].baddbmm_(across, T[:, :k, k:], alpha=-1)
        T[:, :k, :k], T[:, k:, :k], T[:, :k, k:] = -inverse, across, across.mT

    def search(self, least: Tensor) -> Tensor:
        """Exchange greedily while a pair gains more than `least`, shape (rows,); how often, shape (rows,)."""
        k, others = self.k, self.S.shape[1] - self.k
        rows = torch.arange(len(self.S), device=self.S.device)
        count, alive = torch.zeros_like(rows), self.sound
        for _ in range(_MOST):
            best, at = self._gains().flatten(1).max(dim=1)
            alive = alive & (best > least)
            if not bool(alive.any()):
                break
            i, j = at // others, k + at % others
            p, q = self.slots[rows, i], self.slots[rows, j]
            self._sweep(rows, p, alive, -1.0)
            self._sweep(rows, q, alive, 1.0)
            self.slots[rows, i], self.slots[rows, j] = torch.where(alive, q, p), torch.where(alive, p, q)
            count += alive
        return count

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and squared prices' denominators of kept candidates; residuals and curvatures of pruned ones."""
        last = self.T[:, :-1, -1].gather(1, self.slots)
        diagonal = self.T.diagonal(dim1=1, dim2=2).gather(1, self.slots)
        return last[:, : self.k], -diagonal[:, : self.k], last[:, self.k :], diagonal[:, self.k :]

    def _gains(self) -> Tensor:
        """Gain of every pair, (rows, kept candidates, pruned candidates); -1 where there is no such pair."""
        x, inverse, r, s = self._parts()
        stride = self.T.shape[2]
        at = (self.slots[:, : self.k, None] * stride + self.slots[:, None, self.k :]).flatten(1)
        U = self.T.flatten(1).gather(1, at).view(self.pairs.shape)
        ratio = (x / inverse)[:, :, None]
        curvature = torch.addcdiv(s[:, None, :], U.square(), inverse[:, :, None])
        gain = (U * ratio).add_(r[:, None, :]).square_().div_(curvature).sub_(ratio * x[:, :, None])
        return gain.masked_fill_(~self.pairs, -1.0)

    def _sweep(self, rows: Tensor, pivot: Tensor, alive: Tensor, sign: float) -> None:
        """Take the pivot of every row that is alive into the support (sign 1) or out of it (sign -1)."""
        column = self.T[rows, :, pivot]
        value = column[rows, pivot]
        column[rows, pivot] -= sign
        scale = torch.where(alive, -1 / value, 0.0)
        self.T.baddbmm_((column * scale[:, None])[:, :, None], column[:, None, :])
        self.T[rows, pivot, pivot] -= 2 * sign * alive

    def answer(self, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' weights and supports after the search."""
        c = self.S.shape[1]
        on = torch.zeros_like(self.usable).scatter_(1, self.slots[:, : self.k], self.usable[:, : self.k])
        x = torch.where(on, self.T[:, :c, c], 0.0)
        move = self.V[:, :, c:] - torch.bmm(self.V[:, :, :c], (x - self.start)[:, :, None])
        follow = torch.linalg.solve_triangular(self.L.mT, move, upper=True)[:, :, 0].mul_(self.inside)
        after, mask = d.scatter_add(1, self.F, follow), m.clone()
        row, slot = self.usable.nonzero(as_tuple=True)
        after[row, self.S[row, slot]], mask[row, self.S[row, slot]] = x[row, slot], on[row, slot]
        return after, mask

    def offer(self, offers: Offers, part: Tensor, valid: Tensor) -> None:
        """Note what single entries of these rows cost and gain; nothing where the search was not taken over."""
        x, inverse, r, s = self._parts()
        places, free = self.S.gather(1, self.slots), self.usable & valid[:, None]
        price, i = torch.where(free[:, : self.k], x.square() / inverse, float("inf")).min(dim=1)
        gain, j = torch.where(free[:, self.k :], r.square() / s, -float("inf")).max(dim=1)
        offers.price[part], offers.give[part] = price, places.gather(1, i[:, None])[:, 0]
        offers.gain[part], offers.take[part] = gain, places[:, self.k :].gather(1, j[:, None])[:, 0]


def _block(H: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """H[first, second] of every row: (rows, a, b), by flat positions, which is three times as fast as by pairs."""
    # Half the room of int64 where that many entries can be counted.
    kind = torch.int32 if H.numel() < 2**31 else torch.int64
    at = (first * len(H)).to(kind)[:, :, None] + second.to(kind)[:, None, :]
    return H.reshape(-1).index_select(0, at.view(-1)).view(at.shape)
