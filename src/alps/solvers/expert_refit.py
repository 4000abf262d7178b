"""Refit of the output maps of several experts to one sum, by Gauss-Seidel over the experts.

legend  R     residual: target minus present output of the mixture                    (T, d)
        X_i   inputs of expert i's map on its n_i tokens, times their routing weights  (n_i, m)
        D_i   change of the expert's weight                                            (d, m)
        w     token weights                                                            (T,)
        p     tokens of the prior                                                      scalar
        lam_i max(p / n_i, 0.01) * mean(diag(X_i^T w X_i))                             scalar
The objective is sum_t w_t ||R_t - sum_i (X_i D_i^T)_t||^2 + sum_i lam_i ||D_i||^2. For one expert it is solved exactly:
D_i = (R_i^T w X_i) (X_i^T w X_i + lam_i I)^{-1}, where R_i is the residual without the expert's own change. lam_i has
the effect of p more tokens, of white inputs with the expert's mean energy, on which its output was right. So an expert
with few tokens stays close to its weight, and one without tokens keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alps.core.errors import SolveFailed

# Numbers of an expert's tokens, ascending, and X_i.
ExpertInputs = tuple[Tensor, Tensor]

_MIN_DAMPING = 0.01
# Tokens of one float32 product; the products are added in float64.
_CHUNK = 1024


def refit_output_maps(
    residual: Tensor,
    experts: Sequence[Callable[[], ExpertInputs]],
    token_weights: Tensor,
    *,
    prior_tokens: float,
    sweeps: int = 2,
) -> list[Tensor | None]:
    """Compute the changes of the experts' output maps that reduce a common residual.

    Args:
        residual: R, shape (T, d), float32.
        experts: functions that compute the token numbers and X_i; called once in each sweep, in this order, so that the
            inputs of one expert are in memory at a time.
        token_weights: w, shape (T,), float32.
        prior_tokens: p.
        sweeps: passes over the experts.

    Returns:
        D_i of each expert, float32; None for an expert without tokens.

    Raises:
        SolveFailed: if inputs are not finite.
    """
    residual, changes = residual.clone(), list[Tensor | None]([None] * len(experts))
    for _ in range(sweeps):
        for i, inputs in enumerate(experts):
            rows, X = inputs()
            if not len(rows):
                continue
            previous = changes[i]
            if previous is not None:
                residual.index_add_(0, rows, X @ previous.T)
            change = _ridge(X, residual[rows], token_weights[rows], prior_tokens)
            residual.index_add_(0, rows, X @ change.T, alpha=-1)
            changes[i] = change
    return changes


def weighted_gram(X: Tensor, token_weights: Tensor, *, prior_tokens: float) -> Tensor:
    """Return X^T w X + lam I, shape (m, m), float64; I if all inputs are zero.

    Args:
        X: inputs of a map, times the routing weights, shape (n, m), float32.
        token_weights: w, shape (n,), float32.
        prior_tokens: p.
    """
    gram = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for part, weights in zip(torch.split(X, _CHUNK), torch.split(token_weights, _CHUNK), strict=True):
        gram += (part.T @ (part * weights[:, None])).double()
    energy = float(gram.diagonal().mean())
    gram.diagonal().add_(max(prior_tokens / len(X), _MIN_DAMPING) * energy if energy else 1.0)
    return gram


def _ridge(X: Tensor, R: Tensor, weights: Tensor, prior_tokens: float) -> Tensor:
    """Return (R^T w X) (X^T w X + lam I)^{-1}, shape (d, m), float32."""
    cross = X.new_zeros(R.shape[1], X.shape[1], dtype=torch.float64)
    for rows in torch.split(torch.arange(len(X), device=X.device), _CHUNK):
        cross += (R[rows].T @ (X[rows] * weights[rows, None])).double()
    factor, failed = torch.linalg.cholesky_ex(weighted_gram(X, weights, prior_tokens=prior_tokens))
    if int(failed):
        raise SolveFailed("the inputs of an expert are not finite: the calibration inputs are unusable")
    return torch.cholesky_solve(cross.T, factor).T.float()
