"""Small layer problems for tests of solvers, and float64 solutions to compare with.

A problem is a dense weight (out, in) and calibration inputs (tokens, in), both float32 and both seeded. The
widths are multiples of 4, 5 and 8 unless the problem is about the width, so that every N:M pattern fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OUT, IN, TOKENS = 12, 40, 160


class Problem(NamedTuple):
    """Dense weight (out, in) and calibration inputs (tokens, in)."""

    weight: Tensor
    inputs: Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Return seeded standard normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(seed: int, tokens: int, width: int) -> Tensor:
    """Return inputs with a few strong directions and uneven feature sizes, like the activations of a model."""
    factors = max(width // 4, 1)
    common = normal(seed, tokens, factors) @ normal(seed + 1, factors, width)
    return (common + 0.3 * normal(seed + 2, tokens, width)) * torch.exp(0.5 * normal(seed + 3, width))


def gaussian() -> Problem:
    return Problem(normal(1, OUT, IN), normal(2, TOKENS, IN))


def correlated() -> Problem:
    return Problem(normal(3, OUT, IN), correlated_inputs(4, TOKENS, IN))


def dead_inputs() -> Problem:
    inputs = correlated_inputs(11, TOKENS, IN)
    inputs[:, [0, 3, 17, 18, 19, 39]] = 0.0
    return Problem(normal(10, OUT, IN), inputs)


def zero_inputs() -> Problem:
    return Problem(normal(20, OUT, IN), torch.zeros(TOKENS, IN))


def zero_weight() -> Problem:
    return Problem(torch.zeros(OUT, IN), normal(21, TOKENS, IN))


def one_output() -> Problem:
    return Problem(normal(22, 1, IN), correlated_inputs(23, TOKENS, IN))


def one_input() -> Problem:
    return Problem(normal(30, OUT, 1), normal(31, TOKENS, 1))


def constant_inputs() -> Problem:
    return Problem(normal(32, OUT, IN), torch.full((TOKENS, IN), 0.7))


def few_tokens() -> Problem:
    return Problem(normal(33, OUT, IN), normal(34, IN // 4, IN))


def huge_range() -> Problem:
    return Problem(normal(35, OUT, IN), normal(36, TOKENS, IN) * torch.logspace(-4, 4, IN))


def huge_token() -> Problem:
    inputs = correlated_inputs(38, TOKENS, IN)
    inputs[0] *= 1e4
    return Problem(normal(37, OUT, IN), inputs)


def rounded_weight() -> Problem:
    """Return weights that are bfloat16 numbers close together, with many ties, as in a real checkpoint."""
    weight = (1 + 0.05 * normal(42, OUT, IN)).to(torch.bfloat16).float()
    return Problem(weight * normal(43, OUT, IN).sign(), correlated_inputs(44, TOKENS, IN))


def equal_weights() -> Problem:
    return Problem(0.5 * normal(48, OUT, IN).sign(), normal(49, TOKENS, IN))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    make.__name__: make
    for make in (
        gaussian,
        correlated,
        dead_inputs,
        zero_inputs,
        zero_weight,
        one_output,
        one_input,
        constant_inputs,
        few_tokens,
        huge_range,
        huge_token,
        rounded_weight,
        equal_weights,
    )
}


WIDE = 64


def twice_the_same_inputs() -> Problem:
    """Return inputs that all occur twice, so that the Gram is singular."""
    inputs = correlated_inputs(100, 400, WIDE // 2)
    return Problem(normal(101, 24, WIDE), torch.cat([inputs, inputs], dim=1))


def condition_1e12() -> Problem:
    """Return an X with singular values from 1 to 1e-6, so that X^T X has a condition number of 1e12."""
    left, _ = torch.linalg.qr(normal(5, 400, WIDE).double())
    right, _ = torch.linalg.qr(normal(6, WIDE, WIDE).double())
    return Problem(
        normal(102, 24, WIDE), (30 * left * torch.logspace(0, -6, WIDE, dtype=torch.float64) @ right).float()
    )


def huge_input() -> Problem:
    inputs = correlated_inputs(110, 400, WIDE)
    inputs[:, 7] *= 1e4
    return Problem(normal(103, 24, WIDE), inputs)


def huge_activation() -> Problem:
    """Return activations of which a single one is 1e4 times as large as the others."""
    inputs = correlated_inputs(111, 400, WIDE)
    inputs[5, 9] *= 1e4
    return Problem(normal(104, 24, WIDE), inputs)


def outlier_channels() -> Problem:
    weight = normal(106, 24, WIDE)
    weight[:, [3, 40]] *= 50
    return Problem(weight.to(torch.bfloat16).float(), correlated_inputs(113, 400, WIDE))


def outlier_channels_on_weak_inputs() -> Problem:
    """Return a problem in which the largest weights matter least."""
    inputs = correlated_inputs(113, 400, WIDE)
    inputs[:, [3, 40]] /= 500
    return Problem(outlier_channels().weight, inputs)


# Problems that are hard numerically; so are `zero_inputs`, `dead_inputs`, `few_tokens`, `huge_range` and `huge_token`.
ADVERSARIAL: dict[str, Callable[[], Problem]] = {
    make.__name__: make
    for make in (
        twice_the_same_inputs,
        condition_1e12,
        huge_input,
        huge_activation,
        outlier_channels,
        outlier_channels_on_weak_inputs,
    )
}


def random_mask(seed: int, rows: int, columns: int, share: float = 0.5) -> Tensor:
    """Return a seeded boolean mask with about `share` of its entries True."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


def hessian64(inputs: Tensor, fraction: float = 0.01) -> tuple[Tensor, float]:
    """Return X^T X + lam I in float64, and lam = fraction * mean(diag(X^T X)); lam = 1 for inputs of zeros."""
    gram = inputs.double().T @ inputs.double()
    mean = float(gram.diagonal().mean())
    damping = fraction * mean if mean > 0 else 1.0
    return gram + damping * torch.eye(gram.shape[0], dtype=torch.float64), damping


def objective64(pruned: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(D H D^T) row by row for D = pruned - dense, in float64, shape (out,)."""
    delta = pruned.double() - dense.double()
    return ((delta @ hessian) * delta).sum(dim=1)


def best_on_support(dense: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Return the weights (out, in) of least `objective64` that are zero off the mask, by one float64 solve a row."""
    solution = torch.zeros_like(dense, dtype=torch.float64)
    target = dense.double() @ hessian
    for row in range(dense.shape[0]):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            solution[row, kept] = torch.linalg.solve(hessian[kept][:, kept], target[row, kept])
    return solution
