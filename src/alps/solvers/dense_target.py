"""What a site is asked to reproduce: its dense weight on its inputs, or the dense model's own outputs.

legend  W      dense weight                                             (out, in)
        X      inputs from the pruned prefix, X_d from the dense model  (tokens, in)
        G      Gram X^T X                                               (in, in)
        lam    damping, `fraction` * mean(diag(G))                      scalar
        H      G + lam I                                                (in, in)
        t      share of the dense target, 0 to 1                        scalar
        W*     minimiser of the layer problem without a pattern         (out, in)
The problem is min ||X W_hat^T - Y||^2 + lam ||W_hat - W||^2 with Y = X W^T + t (X_d - X) W^T. Its right-hand side is
C = W H + t W (X_d - X)^T X, and up to a constant its objective is ||W_hat - W*||_H^2 with W* = C H^{-1}: the problem
that every method solves for its dense weight, with W* in the dense weight's place. W* is made with a larger damping,
`target_damping`, than that of the method which then prunes it: what few tokens say of it needs more. t = 0 is ALPS
(arXiv 2406.07831); fitting the dense outputs from the pruned inputs is done in GPTAQ (arXiv 2504.02692) and
DuoGPT (arXiv 2506.20194).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alps.core.errors import ConfigError, SolveFailed
from alps.core.statistics import InputStats
from alps.solvers.hessian import damped

# Chosen on held-back text at 16 k tokens, where a hundredth of it predicts the text no better, and copied tokens worse:
# docs/experiments.md, "What a dense target costs".
PRIOR_TOKENS = 16_384
_LEAST = 0.01


def target_damping(tokens: float) -> float:
    """The damping of a target as a fraction of the Gram's mean diagonal, for sums over so many tokens.

    It is what 16,384 more tokens would add that are white, of the mean energy, and the same in both models. Directions
    in which the inputs hardly vary then stay as they are in the dense weight, unless many tokens speak for a change.
    """
    return max(PRIOR_TOKENS / max(tokens, 1), _LEAST)


def target_shift(stats: InputStats, share: float, fraction: float) -> Tensor:
    """t (X_d - X)^T X H^{-1}, shape (in, in) in float32, for all sites of one input.

    Args:
        stats: sums of the inputs with their drift.
        share: t.
        fraction: damping as a fraction of the Gram's mean diagonal; it draws W* towards the dense weight.

    Raises:
        SolveFailed: when the Hessian is not positive definite.
    """
    assert stats.input_shift is not None, "the input shift was not collected"
    hessian, _ = damped(stats, fraction)
    # float64: rounding grows with the condition number of H, and an outlier among the inputs makes that huge.
    factor, failed = torch.linalg.cholesky_ex(hessian.double())
    if int(failed):
        raise SolveFailed("the Hessian is not positive definite: raise the damping, or use --target pruned")
    return share * torch.cholesky_solve(stats.input_shift.double().T, factor).T.float()


def shifted_weight(weight: Tensor, shift: Tensor) -> Tensor:
    """W* for a dense weight (out, in) and the `target_shift` (in, in) of its inputs."""
    return torch.addmm(weight, weight, shift)


def parse_target(target: str | float, name: str = "target") -> float:
    """Share of the dense target for what a user wrote as the value of a setting.

    Raises:
        ConfigError: for anything but `pruned`, `dense` or a number between 0 and 1.
    """
    try:
        share = {"pruned": 0.0, "dense": 1.0}.get(str(target), math.nan)
        share = float(target) if math.isnan(share) else share
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        what = name.replace("_", " ").capitalize()
        raise ConfigError(f"{what} '{target}' is wrong: write pruned, dense, or a share between 0 and 1.")
    return share
