"""Damping, unit-diagonal scaling and factorisations of the layer Hessian.

legend  G    Gram of the inputs, X^T X                      (in, in)
        lam  damping, `fraction` * mean(diag(G))            scalar
        H    G + lam I                                      (in, in)
        E    Diag(H)^{-1/2}, kept as a vector               (in,)
ALPS (arXiv 2406.07831), Section 3: the problem is solved for E H E, which has a unit diagonal, and W E^{-1}.
The text of the paper says lam = 0.01 Tr(G); its authors' code uses the mean of the diagonal, as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats
from alps.solvers.reductions import column_squares, inner

_HOPELESS = "the Hessian stays indefinite under any damping: the calibration inputs are unusable"
# Inverses kept for the other sites of an input, which begin with the same penalties: bytes, and of a GPU's memory this
# share where that is more.
_CACHE_BYTES, _CACHE_SHARE = 2**28, 1 / 16


def kept_bytes(device: torch.device) -> int:
    """How much the inverses that are kept may take on a device."""
    if device.type != "cuda":
        return _CACHE_BYTES
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(_CACHE_BYTES, int(memory * _CACHE_SHARE))


def damping_of(stats: InputStats, fraction: float) -> float:
    """The absolute damping lam; 1 for inputs that are zero throughout, which leaves H = I and W's size to decide."""
    mean = float(stats.square.mean(dtype=torch.float64))
    return fraction * mean if mean > 0 else 1.0


def damped(stats: InputStats, fraction: float) -> tuple[Tensor, float]:
    """H = G + lam I as a fresh (in, in) float32 matrix, and lam."""
    damping = damping_of(stats, fraction)
    hessian = stats.gram()
    hessian.diagonal().add_(damping)
    return hessian, damping


@dataclass
class ScaledHessian:
    """E H E with unit diagonal, the scale E, and the inverses of E H E + rho I that were asked for.

    Attributes:
        matrix: E H E, shape (in, in), float32.
        scale: E, shape (in,); a weight is `W / scale` inside the scaled problem.
        damping: the absolute lam inside H.
        notes: what a user should know about these inputs.
    """

    matrix: Tensor
    scale: Tensor
    damping: float
    notes: list[str] = field(default_factory=list)
    _inverses: dict[tuple[float, torch.dtype], Tensor] = field(default_factory=dict)

    def inverse(self, rho: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E H E + rho I)^{-1}, shape (in, in): computed in float32, without an eigendecomposition.

        Raises:
            SolveFailed: when the matrix is not positive definite, which damped finite sums never are.
        """
        if (rho, dtype) in self._inverses:
            return self._inverses[rho, dtype]
        shifted = self.matrix.clone()
        shifted.diagonal().add_(rho)
        inverse = (shifted if invert_(shifted) else self._inverse64(rho)).to(dtype)
        if (len(self._inverses) + 1) * inverse.nbytes <= kept_bytes(inverse.device):
            self._inverses[rho, dtype] = inverse
        return inverse

    def _inverse64(self, rho: float) -> Tensor:
        """By Cholesky in float64: for a penalty so small that float32's rounding outweighs it."""
        shifted = self.matrix.double()
        shifted.diagonal().add_(rho)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            raise SolveFailed(f"the Hessian is not positive definite at rho = {rho:g}: raise the damping")
        return torch.cholesky_inverse(factor).float()

    def undamped_energy(self, delta: Tensor) -> float:
        """||X (delta E)^T||_F^2 for `delta` (out, in) in scaled coordinates: the damping's share taken out."""
        return self.undamped(inner(delta @ self.matrix, delta), delta)

    def lost_energy(self, dense: Tensor, pruned: Tensor, support: Tensor | None = None) -> float:
        """`undamped_energy` of dense - pruned, both (out, in) in scaled coordinates.

        `pruned` counts on `support` (1 = kept) alone where one is given. By quarters of the rows, to need little room.
        """
        size = -(-len(dense) // 4)
        lost = 0.0
        for start in range(0, len(dense), size):
            rows = slice(start, start + size)
            kept = pruned[rows] if support is None else pruned[rows] * support[rows]
            lost += self.undamped_energy(dense[rows] - kept)
        return lost

    def undamped(self, energy: float, delta: Tensor) -> float:
        """`undamped_energy` of `delta`, given ||delta||_H^2, which still holds the damping's share."""
        share = self.damping * float((column_squares(delta) * self.scale.square()).sum(dtype=torch.float64))
        # Below this it is the rounding of two float32 sums that should be equal.
        return energy - share if energy - share > 1e-6 * energy else 0.0


# Up to this size LAPACK is as fast as matrix products.
_DIRECT = 320


def invert_(A: Tensor) -> bool:
    """Invert a symmetric positive definite matrix in place; False, and A spoilt, when it is not definite.

    By halves: with B = A11^{-1} A12 and the Schur complement S = A22 - A12^T B, the inverse has the blocks
    A11^{-1} + B S^{-1} B^T, -B S^{-1} and S^{-1}. Nearly all of the 4/3 n^3 flops are matrix products, which run
    several times faster than the n^3 of a Cholesky inverse; half a matrix of workspace.
    """
    n = len(A)
    if n <= _DIRECT:
        factor, failed = torch.linalg.cholesky_ex(A)
        if int(failed):
            return False
        # A lone Cholesky inverse is symmetric only to rounding; products with it do not care.
        A.copy_(torch.cholesky_inverse(factor))
        return True
    half = n // 64 * 32
    A11, A12, A22 = A[:half, :half], A[:half, half:], A[half:, half:]
    if not invert_(A11):
        return False
    B = A11 @ A12
    A22.addmm_(A12.T, B, alpha=-1)
    if not invert_(A22):
        return False
    torch.mm(B, A22, out=A12)
    A11.addmm_(A12, B.T)
    A12.neg_()
    A[half:, :half] = A12.T
    return True


def scaled(stats: InputStats, fraction: float) -> ScaledHessian:
    """Damp and scale the Gram to unit diagonal.

    Sums of float32 can be indefinite by rounding. Damping that does not make up for it is raised tenfold, at most three
    times, and a note says so; without damping (`fraction` 0) the matrix is left as it is.

    Args:
        stats: sums of the inputs, with a Gram.
        fraction: damping as a fraction of the Gram's mean diagonal.

    Raises:
        SolveFailed: when no damping in reach makes the Hessian positive definite.
    """
    notes: list[str] = []
    for raised, raise_note in _attempts(fraction):
        hessian, damping = damped(stats, raised)
        scale = hessian.diagonal().rsqrt()
        hessian.mul_(scale).mul_(scale[:, None])
        hessian.diagonal().fill_(1.0)
        notes = raise_note
        if raised == 0 or _is_definite(hessian):
            break
    else:
        raise SolveFailed(_HOPELESS)
    if dead := int((stats.square == 0).sum()):
        notes.append(f"{dead} of {len(scale)} inputs were zero on every calibration token")
    if stats.tokens < len(scale):
        notes.append(f"{stats.tokens} calibration tokens for {len(scale)} inputs: use more samples")
    return ScaledHessian(hessian, scale, damping, notes)


def _attempts(fraction: float) -> Iterator[tuple[float, list[str]]]:
    """The damping asked for, then tenfold ones, each with the notes that go with it."""
    for attempt in range(4):
        raised = fraction * 10**attempt
        yield raised, [f"damping raised to {raised:g} of the mean diagonal"] if attempt else []


def _is_definite(A: Tensor) -> bool:
    # float32's own rounding fails where the matrix is nearly singular; only float64 may say so.
    return any(not int(torch.linalg.cholesky_ex(A.to(kind))[1]) for kind in (torch.float32, torch.float64))


def inverse_factor(stats: InputStats, fraction: float) -> tuple[Tensor, float, list[str]]:
    """Upper Cholesky factor of H^{-1}, as SparseGPT sweeps with it.

    Computed in float64: rounding in H^{-1} grows with the condition number, which the damping only bounds
    by in / fraction. When the factorisation fails the damping is raised tenfold, at most three times, and a
    note says so.

    Returns:
        The factor U (in, in) in float32 with U^T U = H^{-1}, the damping used, and notes.

    Raises:
        SolveFailed: when no damping in reach makes H positive definite.
    """
    for raised, notes in _attempts(fraction):
        hessian, damping = damped(stats, raised)
        factor, failed = torch.linalg.cholesky_ex(hessian.double())
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float(), damping, notes
    raise SolveFailed(_HOPELESS)
