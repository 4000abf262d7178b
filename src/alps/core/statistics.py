"""Input statistics: sums over the calibration tokens that a layer receives, from which the solvers work.

X is the matrix of those inputs, tokens as rows, shape (tokens, in); X_d is the same in the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from alps.core.device import bfloat16_factors
from alps.core.half_precision import has_fast_bfloat16

# Height of the row panels in which the Gram's upper triangle is summed. At 1536 inputs they take 58 % of the work of
# the full product, and are still high enough for matmul to run at full rate.
_PANEL = 256


class Needs(IntEnum):
    """Input statistics that a method reads; each level includes those below it."""

    NOTHING = 0
    MOMENTS = 1
    GRAM = 2
    INPUT_SHIFT = 3


@dataclass
class InputSums:
    """Running sums of input statistics in float64; `to_stats` rounds them for the solvers.

    Products within one window are float32, and windows are added in float64. A float64 sum of float32 numbers of
    similar size is exact, so that the result depends neither on the order of the windows nor on the number of
    processes.

    Attributes:
        tokens: number of rows of X summed so far.
        total: sum of the rows, shape (in,), float64.
        square: sum of the squared rows, shape (in,), float64.
        panels: upper triangle of the Gram X^T X, float64, cut into panels of 256 rows; each panel begins with its
            diagonal block. None when it is not collected.
        input_shift: (X_d - X)^T X, shape (in, in), float64, of the tokens whose X_d was given. None when it is not
            collected. The difference is summed directly, because in X_d^T X - X^T X it would drown in rounding.
    """

    tokens: int
    total: Tensor
    square: Tensor
    panels: list[Tensor] | None
    input_shift: Tensor | None = None

    @classmethod
    def zeros(cls, size: int, needs: Needs, device: torch.device | str = "cpu") -> InputSums:
        """Create empty sums.

        Args:
            size: number of input features.
            needs: decides if the Gram and the input shift are collected.
            device: of all sums.
        """

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        starts = range(0, size, _PANEL)
        panels = [empty(min(_PANEL, size - start), size - start) for start in starts] if needs >= Needs.GRAM else None
        return cls(0, empty(size), empty(size), panels, empty(size, size) if needs >= Needs.INPUT_SHIFT else None)

    @classmethod
    def of(cls, inputs: Tensor, needs: Needs = Needs.GRAM) -> InputSums:
        """Sum over windows of inputs, shape (..., tokens, in)."""
        sums = cls.zeros(inputs.shape[-1], needs, inputs.device)
        sums.update(inputs)
        return sums

    def update(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens of some windows.

        Args:
            inputs: X, shape (..., tokens, in), any float dtype.
            dense: X_d, same shape; None adds nothing to the input shift.
        """
        assert dense is None or dense.shape == inputs.shape
        windows = _windows(inputs)
        dense_windows = [None] * len(windows) if dense is None or self.input_shift is None else _windows(dense)
        # Products of bfloat16 numbers are exact in float32. A difference of two inputs is rounded to one.
        is_bfloat16 = (
            inputs.dtype is torch.bfloat16 and inputs.device.type == "cpu" and has_fast_bfloat16(inputs.device)
        )
        with bfloat16_factors() if is_bfloat16 else nullcontext():
            for window, dense_window in zip(windows, dense_windows, strict=True):
                self._add(window.to(torch.float32), None if dense_window is None else dense_window.to(torch.float32))

    def _add(self, rows: Tensor, dense: Tensor | None) -> None:
        self.tokens += len(rows)
        self.total += rows.sum(dim=0)
        self.square += rows.square().sum(dim=0)
        for start, panel in zip(range(0, rows.shape[1], _PANEL), self.panels or (), strict=False):
            panel += rows[:, start : start + _PANEL].T @ rows[:, start:]
        if self.input_shift is not None and dense is not None:
            self.input_shift += (dense - rows).T @ rows

    def tensors(self) -> Iterator[Tensor]:
        """Yield all sums in a fixed order; sums created with the same size and needs yield equal shapes."""
        yield from (self.total, self.square, *(self.panels or ()))
        if self.input_shift is not None:
            yield self.input_shift

    def __add__(self, other: InputSums) -> InputSums:
        """Return the sums over both sets of tokens; both must have been created with the same size and needs."""
        added = self._scaled(1.0, self.tokens + other.tokens)
        for tensor, addend in zip(added.tensors(), other.tensors(), strict=True):
            tensor += addend
        return added

    def rescaled(self, tokens: int, of: int | None = None) -> InputSums:
        """Return the sums of `tokens` tokens that are all like the average one; zeros when there are none.

        Args:
            tokens: how many tokens the result stands for.
            of: number of tokens behind these sums, when it differs from `self.tokens`.
        """
        count = self.tokens if of is None else of
        return self._scaled(tokens / count if count else 0.0, tokens)

    def _scaled(self, factor: float, tokens: int) -> InputSums:
        panels = None if self.panels is None else [panel * factor for panel in self.panels]
        input_shift = None if self.input_shift is None else self.input_shift * factor
        return InputSums(tokens, self.total * factor, self.square * factor, panels, input_shift)

    def to_stats(self) -> InputStats:
        """Round to float32 for the solvers; these sums stay valid."""
        panels = None if self.panels is None else list(self.panels)
        return replace(self, panels=panels).into_stats()

    def into_stats(self) -> InputStats:
        """Round to float32 for the solvers and free these sums, which must not be used afterwards.

        Each float64 panel is freed as soon as it is rounded, so that sums and statistics are never both in memory.
        """
        upper = input_shift = None
        if self.panels is not None:
            upper = self.total.new_zeros(len(self.total), len(self.total), dtype=torch.float32)
            for start in range(0, len(upper), _PANEL):
                upper[start : start + _PANEL, start:] = self.panels.pop(0)
        if self.input_shift is not None:
            input_shift = self.input_shift.float()
        self.free()
        return InputStats(self.tokens, self.total.float(), self.square.float(), upper, input_shift)

    def free(self) -> None:
        """Free the Gram and the input shift; the object must not be used afterwards."""
        self.panels = self.input_shift = None

    @staticmethod
    def nbytes(size: int, needs: Needs) -> int:
        """Return the bytes of the Gram and the input shift of `size` input features."""
        triangle = sum(min(_PANEL, size - start) * (size - start) for start in range(0, size, _PANEL))
        return 8 * (triangle * (needs >= Needs.GRAM) + size * size * (needs >= Needs.INPUT_SHIFT))


@dataclass
class InputStats:
    """Input statistics of one or more layers in float32, as the solvers read them.

    Attributes:
        tokens: number of rows of X.
        total: sum of the rows, shape (in,).
        square: sum of the squared rows, shape (in,); the diagonal of the Gram.
        upper: Gram X^T X, shape (in, in), of which only the upper triangle is valid; read it through `gram()`. None
            when it was not collected.
        input_shift: (X_d - X)^T X, shape (in, in), of the tokens whose X_d was given. None when it was not collected.
    """

    tokens: int
    total: Tensor
    square: Tensor
    upper: Tensor | None
    input_shift: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, needs: Needs = Needs.GRAM) -> InputStats:
        """Compute the statistics of inputs, shape (..., tokens, in)."""
        return InputSums.of(inputs, needs).into_stats()

    def gram(self) -> Tensor:
        """Return a new symmetric matrix X^T X, shape (in, in), float32."""
        assert self.upper is not None, "the Gram was not collected"
        gram = self.upper.clone()
        for start in range(0, len(gram), _PANEL):
            stop = start + _PANEL
            gram[start:stop, start:stop] = _mirror(gram[start:stop, start:stop])
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram

    def energy(self, delta: Tensor) -> float:
        """Return ||X delta^T||_F^2 = tr(delta G delta^T), never negative.

        Reads the upper triangle of G only. Products are float32, their sum is float64.

        Args:
            delta: difference of two weights, shape (out, in), float32.
        """
        assert self.upper is not None, "the Gram was not collected"
        total = 0.0
        for start in range(0, len(self.upper), _PANEL):
            stop = start + _PANEL
            left, right = delta[:, start:stop], delta[:, stop:]
            product = left @ _mirror(self.upper[start:stop, start:stop])
            # Entries right of the diagonal block count twice: for themselves and for their mirror image below it.
            product.addmm_(right, self.upper[start:stop, stop:].T, alpha=2)
            total += float(product.mul_(left).sum(dtype=torch.float64))
        return max(total, 0.0)

    def norms(self) -> Tensor:
        """Return the Euclidean norm of every input feature over the tokens, shape (in,)."""
        return self.square.sqrt()

    def mean(self) -> Tensor:
        """Return the mean of every input feature, shape (in,)."""
        return self.total / max(self.tokens, 1)

    def variance(self) -> Tensor:
        """Return the variance of every input feature over all tokens, shape (in,), never negative."""
        return (self.square / max(self.tokens, 1) - self.mean().square()).clamp_min(0)

    def is_finite(self) -> bool:
        """Check that no sum holds a NaN or an infinity."""
        sums = [self.total, self.square, self.upper, self.input_shift]
        return all(bool(torch.isfinite(s).all()) for s in sums if s is not None)


def relative_errors(pruned: Sequence[Tensor], dense: Tensor, stats: InputStats) -> list[float]:
    """Return the relative reconstruction error of each pruned weight, all (out, in); 0 if the dense output is 0.

    legend  W      dense weight                     (out, in)
            W_hat  pruned weight                    (out, in)
            G      Gram of the inputs, X^T X        (in, in)
    The error of Table 1 in ALPS (arXiv 2406.07831):
            ||X (W_hat - W)^T||_F^2 / ||X W^T||_F^2 = tr(D G D^T) / tr(W G W^T),  D = W_hat - W
    """
    reference = stats.energy(dense)
    return [stats.energy(weight - dense) / reference if reference > 0 else 0.0 for weight in pruned]


def relative_error(pruned: Tensor, dense: Tensor, stats: InputStats) -> float:
    """Return the relative reconstruction error of one pruned weight; 0 if the dense output is 0."""
    return relative_errors([pruned], dense, stats)[0]


def _mirror(upper: Tensor) -> Tensor:
    """Return the symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).T


def _windows(inputs: Tensor) -> Tensor:
    """Reshape inputs (..., tokens, in) to (windows, tokens, in), without gradients."""
    return inputs.detach()[None] if inputs.ndim == 2 else inputs.detach().flatten(0, -3)
