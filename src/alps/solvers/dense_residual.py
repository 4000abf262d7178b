"""Target of a layer that makes up for what is missing behind it: how far to go is chosen on held-back tokens.

legend  W      dense weight                                               (out, in)
        G, R   weighted Gram of the inputs, and cross products of the     (in, in), (out, in)
               missing outputs and the inputs
        G_h,   the same sums over held-back tokens                        (in, in), (out, in)
        R_h
        mu     damping of the change, a fraction of mean(diag(G))         scalar
        D      R (G + mu I)^{-1}, a change of W that makes up for it      (out, in)
        t      share of D in the target, 0 to 1                           scalar
        H      G + lam I, lam = 0.01 mean(diag(G))                        (in, in)
        W*     W + t D                                                    (out, in)
A change t D leaves the held-back error const - 2 t tr(D R_h^T) + t^2 tr(D G_h D^T). It is smallest at
t = tr(D R_h^T) / tr(D G_h D^T), where it has fallen by tr(D R_h^T)^2 / tr(D G_h D^T). Of a few dampings the one with
the largest fall is taken: with few tokens, D fits noise unless it is damped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.errors import SolveFailed

# As ALPS damps the layer problem (arXiv 2406.07831, the authors' code).
DAMPING = 0.01
# Dampings of the change.
_FRACTIONS = (0.03, 0.3, 3.0)


@dataclass(frozen=True)
class Correction:
    """Extent to which a layer makes up for what is missing.

    Attributes:
        share: t.
        fraction: damping mu as a fraction of the Gram's mean diagonal.
    """

    share: float
    fraction: float


NO_CORRECTION = Correction(0.0, DAMPING)


def damped_gram(gram: Tensor, fraction: float = DAMPING) -> Tensor:
    """Return a Gram (in, in) in float64 with a fraction of its mean diagonal added; with 1 if all inputs are zero."""
    mean = float(gram.diagonal().mean())
    hessian = (gram + gram.T).double() / 2
    hessian.diagonal().add_(fraction * mean if mean > 0 else 1.0)
    return hessian


def residual_change(gram: Tensor, cross: Tensor, fraction: float) -> Tensor:
    """Return D, shape (out, in), float64.

    Raises:
        SolveFailed: when the damped Gram is not positive definite, or a sum is not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(damped_gram(gram, fraction))
    if int(failed) or not bool(torch.isfinite(cross).all()):
        raise SolveFailed("the calibration inputs are not finite: run with --dtype bfloat16 or float32")
    return torch.cholesky_solve(cross.double().T, factor).T


def choose_correction(gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor) -> Correction:
    """Return the correction that leaves the least error on held-back tokens.

    Args:
        gram: G of the tokens that D is fitted to.
        cross: R of the same tokens.
        held_gram: G_h.
        held_cross: R_h.

    Raises:
        SolveFailed: see `residual_change`.
    """
    best, largest_fall = NO_CORRECTION, 0.0
    for fraction in _FRACTIONS:
        change = residual_change(gram, cross, fraction)
        gain, size = float((change * held_cross).sum()), float(((change @ held_gram) * change).sum())
        if gain <= 0 or size <= 0:
            continue
        share = min(gain / size, 1.0)
        fall = 2 * share * gain - share**2 * size
        if fall > largest_fall:
            best, largest_fall = Correction(share, fraction), fall
    return best


def corrected_weight(weight: Tensor, gram: Tensor, cross: Tensor, correction: Correction) -> Tensor:
    """Return W*, shape (out, in), float64.

    Args:
        weight: W.
        gram: G of all tokens.
        cross: R of all tokens.
        correction: chosen on held-back tokens.

    Raises:
        SolveFailed: see `residual_change`.
    """
    if not correction.share:
        return weight.double()
    return weight.double() + correction.share * residual_change(gram, cross, correction.fraction)
