"""Sums over the calibration tokens of one layer input: all that `models` and `solvers` share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
class InputSums:
    """What is collected of the inputs X of one or more sites, window by window; `rounded` gives what solvers read.

    The products of one window are float32's, and windows are added up in float64. There a sum of float32 numbers of
    like size is exact: it is the same in whatever order, and by however many processes, the windows are added.

    Attributes:
        tokens: number of rows of X summed so far.
        total, square: sums of the rows, and of the squared rows, shape (in,), float64.
        panels: the upper triangle of the Gram X^T X, float64, in panels of 256 of its rows from their diagonal block
            on; None where it was not asked for.
        drift: (X_d - X)^T X, shape (in, in), float64, with the dense model's inputs X_d of the same tokens; None where
            it was not asked for. The difference is summed, since it is what pruning has done so far: X_d^T X itself
            would lose it in the rounding of X^T X.
    """

    tokens: int
    total: Tensor
    square: Tensor
    panels: list[Tensor] | None
    drift: Tensor | None = None

    @classmethod
    def zeros(cls, size: int, needs: Needs, device: torch.device | str = "cpu") -> InputSums:
        """Empty sums for inputs of `size` features, with the Gram and the drift only where `needs` asks for them."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        starts = range(0, size, _PANEL)
        panels = [empty(min(_PANEL, size - start), size - start) for start in starts] if needs >= Needs.GRAM else None
        return cls(0, empty(size), empty(size), panels, empty(size, size) if needs >= Needs.DRIFT else None)

    @classmethod
    def of(cls, inputs: Tensor, needs: Needs = Needs.GRAM) -> InputSums:
        """The sums over some windows, shape (..., tokens, in)."""
        sums = cls.zeros(inputs.shape[-1], needs, inputs.device)
        sums.update(inputs)
        return sums

    def update(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens of some windows, shape (..., tokens, in), any float dtype.

        Args:
            inputs: X, what the site receives.
            dense: X_d, what it receives in the dense model, of the same shape; asked for with the drift only.
        """
        assert self.drift is None or (dense is not None and dense.shape == inputs.shape)
        windows = _windows(inputs)
        others = [None] * len(windows) if dense is None or self.drift is None else _windows(dense)
        for window, other in zip(windows, others, strict=True):
            self._add(window.to(torch.float32), None if other is None else other.to(torch.float32))

    def _add(self, rows: Tensor, dense: Tensor | None) -> None:
        self.tokens += len(rows)
        self.total += rows.sum(dim=0)
        self.square += rows.square().sum(dim=0)
        for start, panel in zip(range(0, rows.shape[1], _PANEL), self.panels or (), strict=False):
            panel += rows[:, start : start + _PANEL].T @ rows[:, start:]
        if self.drift is not None and dense is not None:
            self.drift += (dense - rows).T @ rows

    def parts(self) -> Iterator[Tensor]:
        """All sums, the same number of them wherever the same was asked for."""
        yield from (self.total, self.square, *(self.panels or ()))
        if self.drift is not None:
            yield self.drift

    def __add__(self, other: InputSums) -> InputSums:
        """The sums over both sets of tokens; both must hold the same sums."""
        added = self._scaled(1.0, self.tokens + other.tokens)
        for part, its in zip(added.parts(), other.parts(), strict=True):
            part += its
        return added

    def averaged(self, tokens: int, of: int | None = None) -> InputSums:
        """The sums of so many tokens that are each like the average of these; none of an empty set.

        Args:
            tokens: how many.
            of: tokens of which these are a part of the sums; None where they are all.
        """
        count = self.tokens if of is None else of
        return self._scaled(tokens / count if count else 0.0, tokens)

    def _scaled(self, share: float, tokens: int) -> InputSums:
        panels = None if self.panels is None else [panel * share for panel in self.panels]
        drift = None if self.drift is None else self.drift * share
        return InputSums(tokens, self.total * share, self.square * share, panels, drift)

    def rounded(self) -> InputStats:
        """The same in float32, as solvers read it; these sums stay."""
        panels = None if self.panels is None else list(self.panels)
        return replace(self, panels=panels).released()

    def released(self) -> InputStats:
        """The same; what is large of these sums is let go piece by piece, so that both are never held at once."""
        upper = drift = None
        if self.panels is not None:
            upper = self.total.new_zeros(len(self.total), len(self.total), dtype=torch.float32)
            for start in range(0, len(upper), _PANEL):
                upper[start : start + _PANEL, start:] = self.panels.pop(0)
        if self.drift is not None:
            drift = self.drift.float()
        self.clear()
        return InputStats(self.tokens, self.total.float(), self.square.float(), upper, drift)

    def clear(self) -> None:
        """Let go of what is large: nobody is to read these sums any more."""
        self.panels = self.drift = None

    @staticmethod
    def nbytes(size: int, needs: Needs) -> int:
        """Bytes that the large ones of these sums take."""
        triangle = sum(min(_PANEL, size - start) * (size - start) for start in range(0, size, _PANEL))
        return 8 * (triangle * (needs >= Needs.GRAM) + size * size * (needs >= Needs.DRIFT))


@dataclass
class InputStats:
    """Sums over tokens of the inputs X of one or more sites, float32.

    Attributes:
        tokens: number of rows of X.
        total: sum of the rows, shape (in,).
        square: sum of the squared rows, shape (in,); the diagonal of the Gram.
        upper: the Gram X^T X, shape (in, in), of which only the upper triangle is valid; None where it
            was not asked for. Read it through `gram()`.
        drift: as in `InputSums`.
    """

    tokens: int
    total: Tensor
    square: Tensor
    upper: Tensor | None
    drift: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, needs: Needs = Needs.GRAM) -> InputStats:
        """The sums over some inputs, shape (..., tokens, in)."""
        return InputSums.of(inputs, needs).released()

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


def _windows(inputs: Tensor) -> Tensor:
    """The same values, shape (windows, tokens, in)."""
    return inputs.detach()[None] if inputs.ndim == 2 else inputs.detach().flatten(0, -3)
