"""Damping, unit-diagonal scaling and factorisations of the layer Hessian.

legend  G    Gram of the inputs, X^T X                      (in, in)
        lam  damping, `fraction` * mean(diag(G))            scalar
        H    G + lam I                                      (in, in)
        E    Diag(H)^{-1/2}, kept as a vector               (in,)
ALPS (arXiv 2406.07831), Section 3: the problem is solved for E H E, which has a unit diagonal, and W E^{-1}.
The text of the paper says lam = 0.01 Tr(G); the authors' code and this module use 0.01 of the mean of the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats
from alps.solvers.topk import chunk_size

_UNUSABLE_INPUTS = "the Hessian stays indefinite under any damping: the calibration inputs are unusable"
# Inverses are cached for the other layers of an input, whose solves start with the same penalties. The limit is a
# number of bytes, or this fraction of a GPU's memory if that is larger.
_CACHE_BYTES, _CACHE_FRACTION = 2**28, 1 / 16


def inverse_cache_bytes(device: torch.device) -> int:
    """Return the largest number of bytes of cached inverses on a device."""
    if device.type != "cuda":
        return _CACHE_BYTES
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(_CACHE_BYTES, int(memory * _CACHE_FRACTION))


def absolute_damping(stats: InputStats, fraction: float) -> float:
    """Return the absolute damping lam; 1 if all inputs are zero, so that H = I and the weights are chosen by size."""
    mean = float(stats.square.mean(dtype=torch.float64))
    return fraction * mean if mean > 0 else 1.0


def damped(stats: InputStats, fraction: float) -> tuple[Tensor, float]:
    """Return H = G + lam I as a new (in, in) float32 matrix, and lam."""
    damping = absolute_damping(stats, fraction)
    hessian = stats.gram()
    hessian.diagonal().add_(damping)
    return hessian, damping


@dataclass
class ScaledHessian:
    """The Hessian scaled to unit diagonal, with a cache of its shifted inverses.

    Attributes:
        matrix: E H E, shape (in, in), float32.
        scale: E, shape (in,); a weight is `W / scale` inside the scaled problem.
        damping: the absolute lam inside H.
        notes: remarks for the user about these inputs.
    """

    matrix: Tensor
    scale: Tensor
    damping: float
    notes: list[str] = field(default_factory=list)
    _inverses: dict[tuple[float, torch.dtype], Tensor] = field(default_factory=dict)

    def inverse(self, rho: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (E H E + rho I)^{-1}, shape (in, in), computed in float32 without an eigendecomposition.

        Args:
            rho: the penalty.
            dtype: dtype of the result.

        Raises:
            SolveFailed: if the matrix is not positive definite; damped finite sums always are.
        """
        if (rho, dtype) in self._inverses:
            return self._inverses[rho, dtype]
        shifted = self.matrix.clone()
        shifted.diagonal().add_(rho)
        inverse = (shifted if invert_(shifted) else self._inverse64(rho)).to(dtype)
        if (len(self._inverses) + 1) * inverse.nbytes <= inverse_cache_bytes(inverse.device):
            self._inverses[rho, dtype] = inverse
        return inverse

    def _inverse64(self, rho: float) -> Tensor:
        """Invert by Cholesky in float64, for a penalty that is smaller than the rounding of float32."""
        shifted = self.matrix.double()
        shifted.diagonal().add_(rho)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            raise SolveFailed(f"the Hessian is not positive definite at rho = {rho:g}: raise the damping")
        return torch.cholesky_inverse(factor).float()

    def undamped_energy(self, delta: Tensor) -> float:
        """Return ||X (delta E)^T||_F^2, without the damping term, for `delta` (out, in) in scaled coordinates."""
        return self.undamped(inner(delta @ self.matrix, delta), delta)

    def lost_energy(self, dense: Tensor, pruned: Tensor, support: Tensor | None = None) -> float:
        """Return `undamped_energy` of dense - pruned, computed in four chunks of rows to save memory.

        Args:
            dense: dense weight in scaled coordinates, shape (out, in).
            pruned: pruned weight in scaled coordinates, shape (out, in).
            support: 1 where `pruned` counts and 0 where it counts as zero, shape (out, in); None if it counts
                everywhere.
        """
        size = -(-len(dense) // 4)
        lost = 0.0
        for start in range(0, len(dense), size):
            rows = slice(start, start + size)
            kept = pruned[rows] if support is None else pruned[rows] * support[rows]
            lost += self.undamped_energy(dense[rows] - kept)
        return lost

    def undamped(self, energy: float, delta: Tensor) -> float:
        """Return `undamped_energy` of `delta`, given ||delta||_H^2, which includes the damping term."""
        damping_term = self.damping * float((column_squares(delta) * self.scale.square()).sum(dtype=torch.float64))
        # A smaller difference is the rounding of two float32 sums that should be equal.
        return energy - damping_term if energy - damping_term > 1e-6 * energy else 0.0


# Up to this size LAPACK's Cholesky inverse is as fast as matrix products.
_MAX_CHOLESKY_SIZE = 320


def invert_(A: Tensor) -> bool:
    """Invert a symmetric positive definite matrix in place, by recursion on halves.

    With B = A11^{-1} A12 and the Schur complement S = A22 - A12^T B, the inverse has the blocks A11^{-1} + B S^{-1}
    B^T, -B S^{-1} and S^{-1}. Nearly all of the 4/3 n^3 flops are matrix products, which run several times faster than
    the n^3 flops of a Cholesky inverse. The workspace is half a matrix.

    Returns:
        False if A is not positive definite; its values are then undefined.
    """
    n = len(A)
    if n <= _MAX_CHOLESKY_SIZE:
        factor, failed = torch.linalg.cholesky_ex(A)
        if int(failed):
            return False
        # cholesky_inverse is symmetric only up to rounding, which does not matter for products.
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

    Float32 sums can be indefinite by rounding. If the damping is too small to correct this, it is raised tenfold, at
    most three times, and a note says so. Without damping (`fraction` 0) the matrix is not checked.

    Args:
        stats: input statistics with a Gram.
        fraction: damping as a fraction of the Gram's mean diagonal.

    Raises:
        SolveFailed: if the Hessian is indefinite even with a thousand times the damping.
    """
    notes: list[str] = []
    for raised, raise_notes in _damping_attempts(fraction):
        hessian, damping = damped(stats, raised)
        scale = hessian.diagonal().rsqrt()
        hessian.mul_(scale).mul_(scale[:, None])
        hessian.diagonal().fill_(1.0)
        notes = raise_notes
        if raised == 0 or _is_definite(hessian):
            break
    else:
        raise SolveFailed(_UNUSABLE_INPUTS)
    if dead := int((stats.square == 0).sum()):
        notes.append(f"{dead} of {len(scale)} inputs were zero on every calibration token")
    if stats.tokens < len(scale):
        notes.append(f"{stats.tokens} calibration tokens for {len(scale)} inputs: use more samples")
    return ScaledHessian(hessian, scale, damping, notes)


def _damping_attempts(fraction: float) -> Iterator[tuple[float, list[str]]]:
    """Yield the requested damping, then three tenfold increases, each with its notes."""
    for attempt in range(4):
        raised = fraction * 10**attempt
        yield raised, [f"damping raised to {raised:g} of the mean diagonal"] if attempt else []


def _is_definite(A: Tensor) -> bool:
    # Cholesky in float32 fails by rounding on nearly singular matrices, so that only a failure in float64 counts.
    return any(not int(torch.linalg.cholesky_ex(A.to(dtype))[1]) for dtype in (torch.float32, torch.float64))


@dataclass(frozen=True)
class InverseFactor:
    """Cholesky factor of an inverse Hessian.

    Attributes:
        upper: U with U^T U = H^{-1}, upper triangular, shape (in, in), float32.
        damping: the absolute lam inside H.
        notes: remarks for the user, such as damping that had to be raised.
    """

    upper: Tensor
    damping: float
    notes: list[str]


def inverse_factor(stats: InputStats, fraction: float) -> InverseFactor:
    """Compute the upper Cholesky factor of H^{-1}, which the sweep of SparseGPT uses.

    The computation is in float64: rounding in H^{-1} grows with the condition number, which the damping only bounds by
    in / fraction. If the factorisation fails, the damping is raised tenfold, at most three times, and a note says so.

    Args:
        stats: input statistics with a Gram.
        fraction: damping as a fraction of the Gram's mean diagonal.

    Raises:
        SolveFailed: if H is indefinite even with a thousand times the damping.
    """
    for raised, notes in _damping_attempts(fraction):
        hessian, damping = damped(stats, raised)
        factor, failed = torch.linalg.cholesky_ex(hessian.double())
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return InverseFactor(upper.float(), damping, notes)
    raise SolveFailed(_UNUSABLE_INPUTS)


def rows_per_chunk(matrix: Tensor) -> int:
    """Return the number of rows of a matrix to handle at a time."""
    return max(chunk_size(matrix) // matrix.shape[1], 1)


def row_inner(A: Tensor, B: Tensor) -> Tensor:
    """Return the inner product of every row of A with that of B, shape (rows,); sums are in their dtype."""
    size = rows_per_chunk(A)
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(torch.split(A, size), torch.split(B, size), strict=True)])


def inner(A: Tensor, B: Tensor) -> float:
    """Return the inner product of two matrices; rows are summed in their dtype, the sums of rows in float64."""
    return float(row_inner(A, B).sum(dtype=torch.float64))


def column_squares(A: Tensor) -> Tensor:
    """Return the sum of squares of every column of A (rows, columns), shape (columns,)."""
    return torch.stack([a.square().sum(dim=0) for a in torch.split(A, rows_per_chunk(A))]).sum(dim=0)
