"""Sums over the calibration tokens of one layer input: all that `models` and `solvers` share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

# Width of the column panels in which the Gram's upper triangle is summed: 58 % of the full product at
# 1536 inputs, and still wide enough for a matrix product to run at full rate.
_PANEL = 256


class Needs(IntEnum):
    """What a method has to know of a site's inputs; each level includes the ones below it."""

    NOTHING = 0
    MOMENTS = 1
    GRAM = 2
    DRIFT = 3


@dataclass
class InputStats:
    """Additive float32 sums over tokens of the inputs X of one or more sites.

    Attributes:
        tokens: number of rows of X summed so far.
        total: sum of the rows, shape (in,).
        square: sum of the squared rows, shape (in,); the diagonal of the Gram.
        upper: the Gram X^T X, shape (in, in), of which only the upper triangle is valid; None where it
            was not asked for. Read it through `gram()`.
        drift: (X_d - X)^T X, shape (in, in), with the dense model's inputs X_d of the same tokens; None where it
            was not asked for. The difference is summed, since it is what pruning has done so far: X_d^T X itself
            would lose it in the rounding of X^T X.
    """

    tokens: int
    total: Tensor
    square: Tensor
    upper: Tensor | None
    drift: Tensor | None = None

    @classmethod
    def zeros(cls, size: int, needs: Needs, device: torch.device | str = "cpu") -> InputStats:
        """Empty sums for inputs of `size` features, with the Gram and the drift only where `needs` asks for them."""
        vector = torch.zeros(size, dtype=torch.float32, device=device)
        gram = torch.zeros(size, size, dtype=torch.float32, device=device) if needs >= Needs.GRAM else None
        drift = torch.zeros(size, size, dtype=torch.float32, device=device) if needs >= Needs.DRIFT else None
        return cls(0, vector, vector.clone(), gram, drift)

    @classmethod
    def of(cls, inputs: Tensor, needs: Needs = Needs.GRAM) -> InputStats:
        """The sums of one batch of inputs, shape (..., in)."""
        stats = cls.zeros(inputs.shape[-1], needs, inputs.device)
        stats.update(inputs)
        return stats

    def update(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens of `inputs`, shape (..., in), any float dtype; summed in float32.

        Args:
            inputs: X, what the site receives.
            dense: X_d, what it receives in the dense model, of the same shape; asked for with the drift only.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.tokens += rows.shape[0]
        self.total += rows.sum(dim=0)
        self.square += rows.square().sum(dim=0)
        if self.upper is not None:
            for start in range(0, rows.shape[1], _PANEL):
                panel = slice(start, start + _PANEL)
                self.upper[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])
        if self.drift is not None:
            assert dense is not None and dense.shape == inputs.shape
            away = dense.detach().reshape(rows.shape).to(torch.float32) - rows
            self.drift.addmm_(away.T, rows)

    def __add__(self, other: InputStats) -> InputStats:
        """The sums over both sets of tokens; both must hold the same sums."""
        assert (self.upper is None) == (other.upper is None) and (self.drift is None) == (other.drift is None)
        upper = None if self.upper is None or other.upper is None else self.upper + other.upper
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        total, square = self.total + other.total, self.square + other.square
        return InputStats(self.tokens + other.tokens, total, square, upper, drift)

    def averaged(self, tokens: int, of: int | None = None) -> InputStats:
        """The sums of so many tokens that are each like the average of these; none of an empty set.

        Args:
            tokens: how many.
            of: tokens of which these are a part of the sums; None where they are all.
        """
        count = self.tokens if of is None else of
        share = tokens / count if count else 0.0
        upper = None if self.upper is None else self.upper * share
        drift = None if self.drift is None else self.drift * share
        return InputStats(tokens, self.total * share, self.square * share, upper, drift)

    def gram(self) -> Tensor:
        """A fresh symmetric copy of X^T X, shape (in, in), float32."""
        assert self.upper is not None, "the Gram was not collected"
        gram = self.upper.clone()
        for start in range(0, len(gram), _PANEL):
            stop = start + _PANEL
            gram[start:stop, start:stop] = _mirrored(gram[start:stop, start:stop])
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram

    def energy(self, delta: Tensor) -> float:
        """||X delta^T||_F^2 = tr(delta G delta^T) for delta (out, in) in float32; never negative.

        Products in float32, over the upper triangle alone; their sum in float64.
        """
        assert self.upper is not None, "the Gram was not collected"
        total = 0.0
        for start in range(0, len(self.upper), _PANEL):
            stop = start + _PANEL
            mine, rest = delta[:, start:stop], delta[:, stop:]
            # What lies right of the diagonal block stands for its mirror image below it as well.
            product = mine @ _mirrored(self.upper[start:stop, start:stop])
            product.addmm_(rest, self.upper[start:stop, stop:].T, alpha=2)
            total += float(product.mul_(mine).sum(dtype=torch.float64))
        return max(total, 0.0)

    def norms(self) -> Tensor:
        """Euclidean norm of every input feature over the tokens, shape (in,)."""
        return self.square.sqrt()

    def mean(self) -> Tensor:
        """Mean of every input feature, shape (in,)."""
        return self.total / max(self.tokens, 1)

    def variance(self) -> Tensor:
        """Pooled variance of every input feature over all tokens, shape (in,); never negative."""
        return (self.square / max(self.tokens, 1) - self.mean().square()).clamp_min(0)

    def is_finite(self) -> bool:
        """Whether no sum has met or become a NaN or an infinity."""
        sums = [self.total, self.square, self.upper, self.drift]
        return all(bool(torch.isfinite(s).all()) for s in sums if s is not None)


def _mirrored(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T
