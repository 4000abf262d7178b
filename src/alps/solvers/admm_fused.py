"""ADMM steps for large layers: products in low precision, few matrices, and few passes over them.

legend  Z      argument of the projection, W + V / rho                 (out, in)
        M      support of the projection, 1 = kept                     (out, in)
        D      projection, Z on M                                      (out, in)   Eq. 3
        U      multiplier V / rho, Z off M                             (out, in)   Eq. 4
        W      weights, free of the pattern                            (out, in)   Eq. 3
        N      dense weight in scaled coordinates                      (out, in)
        H      Hessian with unit diagonal                              (in, in)
        rho    penalty                                                 scalar
The steps are equivalent to those of `admm.py`, which are written as in ALPS (arXiv 2406.07831), Eq. 4. D and U are both
parts of Z, so that one matrix holds both. With C = N H the W-step becomes

    W = N + rho (D - U - N)(H + rho I)^{-1}

where rho (H + rho I)^{-1} has a norm of at most 1. Rounding the left factor to 8 bits therefore changes W by no more
than that rounding. In the published form the left factor contains N H, whose rounding would be multiplied by up to 1 /
rho.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alps.solvers.hessian import ScaledHessian
from alps.solvers.patterns import MaskedPattern, Pattern, Unstructured
from alps.solvers.row_parallel import RowShard
from alps.solvers.topk import LocalScores, approx_topk_mask

# Largest error of the number of kept entries in every projection but the last, as a fraction of that number. It is a
# fifteenth of the change below which the schedule ends the loop.
_SLACK = 2e-5


class FusedSteps:
    """State and iterations of ADMM for large layers; implements `admm.Steps`.

    Besides its arguments it holds three matrices (out, in) in float32, and two more in bfloat16 or a fourth in float32.
    """

    def __init__(self, hessian: ScaledHessian, dense: Tensor, pattern: Pattern, dtype: torch.dtype) -> None:
        self._hessian, self._N, self._pattern, self._dtype = hessian, dense, pattern, dtype
        self._Z, self._M = torch.empty_like(dense), torch.empty_like(dense)
        self._allocate()
        self.restart()

    @property
    def mask(self) -> Tensor:
        """Support of D, shape (out, in), boolean; a new tensor."""
        return self._M.bool()

    def restart(self) -> None:
        """Set D to the projection of the dense weight, and V to 0."""
        self._project(self._N)
        torch.mul(self._N, self._M, out=self._Z)
        self._inverse: Tensor | None = None
        self._rho = 0.0

    def step(self, rho: float) -> None:
        """Run one W-step and one projection with the penalty rho."""
        # V stays unchanged when rho changes, so that U = V / rho is rescaled.
        rescale, Z, M = self._rho / rho, self._Z, self._M
        if self._inverse is None or rho != self._rho:
            self._inverse = self._recompute_inverse(rho)
        self._rho = rho
        # N - (D - U), where D - U is Z on the support and -rescale Z off it.
        torch.add(self._N, Z, alpha=rescale, out=self._scratch)
        self._scratch.addcmul_(M, Z, value=-1 - rescale)
        if self._left is not self._scratch:
            self._left.copy_(self._scratch)
        torch.mm(self._left, self._inverse, out=self._product)
        # W + U, where U is rescale Z off the support.
        Z.addcmul_(M, Z, value=-1)
        torch.add(self._weights(), Z, alpha=rescale, out=Z)
        self._project(Z)

    def gap(self) -> float:
        """Return ||W - D||_F / ||W||_F after the last step."""
        W = self._weights()
        size = float(W.norm())
        return float(W.addcmul_(self._Z, self._M, value=-1).norm()) / max(size, 1e-38)

    def lost_energy(self) -> float:
        """Return the energy of the outputs that D has lost after the last step, without the damping term."""
        return self._hessian.lost_energy(self._N, self._Z, self._M)

    def projected(self) -> Tensor:
        """Return D, shape (out, in), with exactly as many entries as the pattern keeps; no step may follow."""
        self._project(self._Z, slack=0.0)
        return self._Z.mul_(self._M)

    def _allocate(self) -> None:
        self._scratch = torch.empty_like(self._N)
        self._product = torch.empty_like(self._N, dtype=self._dtype)
        low = self._dtype is not torch.float32
        self._left = torch.empty_like(self._product) if low else self._scratch

    def _recompute_inverse(self, rho: float) -> Tensor:
        rows, columns = self._N.shape
        self._inverse = None
        if columns <= rows:
            return self._hessian.inverse(rho, self._dtype)
        # The inverse in float32 is larger than all buffers of a step, which are freed while it is computed.
        del self._scratch, self._left, self._product
        inverse = self._hessian.inverse(rho, self._dtype)
        self._allocate()
        return inverse

    def _weights(self) -> Tensor:
        """Return W of the last step in the scratch buffer."""
        W = self._scratch.copy_(self._product)
        return torch.add(self._N, W, alpha=-self._rho, out=W)

    def _project(self, Z: Tensor, slack: float = _SLACK) -> None:
        """Set M to the support of the projection of Z."""
        sizes = torch.abs(Z, out=self._scratch)
        part = self._pattern if isinstance(self._pattern, RowShard) else None
        entries = Z.numel() if part is None else part.entries
        kept = entries - self._pattern.pruned_count(entries)
        if isinstance(self._pattern, MaskedPattern):
            sizes.masked_fill_(~self._pattern.allowed, -float("inf"))
        if slack and isinstance(self._pattern.base, Unstructured) and 0 < kept < entries:
            flat = sizes.view(-1)
            approx_topk_mask(LocalScores(flat) if part is None else part.scores(flat), kept, slack, self._M.view(-1))
        else:
            self._M.copy_(self._pattern.select(sizes))
