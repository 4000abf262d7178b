"""Dense target: let a layer reproduce the dense model's outputs in place of its own dense weight's outputs.

legend  W      dense weight                                             (out, in)
        X      inputs from the pruned prefix, X_d from the dense model  (tokens, in)
        G      Gram X^T X                                               (in, in)
        lam    damping, `fraction` * mean(diag(G))                      scalar
        H      G + lam I                                                (in, in)
        t      share of the dense target, 0 to 1                        scalar
        W*     minimiser of the layer problem without a pattern         (out, in)
The problem is min ||X W_hat^T - Y||^2 + lam ||W_hat - W||^2 with Y = X W^T + t (X_d - X) W^T. Its right-hand side is
C = W H + t W (X_d - X)^T X. Up to a constant its objective is ||W_hat - W*||_H^2 with W* = C H^{-1}. Every method can
therefore solve it by pruning W* in place of the dense weight. W* is computed with a larger damping, `target_damping`,
than that of the pruning method, because an estimate of W* from few tokens is noisy. t = 0 is ALPS (arXiv 2406.07831).
GPTAQ (arXiv 2504.02692) and DuoGPT (arXiv 2506.20194) fit the dense outputs from the pruned inputs, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats
from alps.solvers.hessian import damped

# Chosen on held-back text at 16 k tokens. A hundredth of it gives no better perplexity there, and predicts copied
# tokens worse: docs/project/log/targets.md, "What a dense target costs".
PRIOR_TOKENS = 16_384
_MIN_TARGET_DAMPING = 0.01


def target_damping(tokens: float) -> float:
    """Return the damping of a target, as a fraction of the Gram's mean diagonal, for a number of calibration tokens.

    It has the effect of 16,384 more tokens of white inputs that have the mean energy and are equal in both models. In
    directions in which the inputs have little variance, the target then stays close to the dense weight unless there
    are many tokens.
    """
    return max(PRIOR_TOKENS / max(tokens, 1), _MIN_TARGET_DAMPING)


def target_shift(stats: InputStats, share: float, fraction: float) -> Tensor:
    """Compute t (X_d - X)^T X H^{-1}, shape (in, in) in float32, for all layers of one input.

    Args:
        stats: input statistics with the shift from the dense model.
        share: share t of the dense target.
        fraction: damping as a fraction of the Gram's mean diagonal; it draws W* towards the dense weight.

    Raises:
        SolveFailed: if the Hessian is not positive definite.
    """
    assert stats.input_shift is not None, "the input shift was not collected"
    hessian, _ = damped(stats, fraction)
    # In float64, because rounding grows with the condition number of H, and outliers among the inputs make it huge.
    factor, failed = torch.linalg.cholesky_ex(hessian.double())
    if int(failed):
        raise SolveFailed("the Hessian is not positive definite: raise the damping, or use no dense target")
    return share * torch.cholesky_solve(stats.input_shift.double().T, factor).T.float()


def shifted_weight(weight: Tensor, shift: Tensor) -> Tensor:
    """Return W* for a dense weight (out, in) and the `target_shift` (in, in) of its inputs."""
    return torch.addmm(weight, weight, shift)
