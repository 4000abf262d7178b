"""Sparsity patterns, and the selection of the entries with the largest scores under a pattern.

All counts are exact: a sparsity of 0.7 prunes exactly round(0.7 n) entries. Entries are selected by rank, and ties are
broken by position. A comparison with a threshold alone would not be exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.solvers.topk import redistribute, topk_in_groups, topk_in_rows
from alps.solvers.topk import topk_mask as topk_mask

Scope = Literal["matrix", "row"]


class _PatternDefaults:
    """Defaults for patterns that may keep any entry of a matrix; `MaskedPattern` has its own versions."""

    @property
    def base(self) -> Self:
        """The pattern itself; of a `MaskedPattern`, the pattern without the mask."""
        return self

    def part(self, rows: slice, columns: slice) -> Self:  # noqa: ARG002 - part of the shared interface
        """Return the pattern on some rows and some columns of the matrix."""
        return self

    def mask_scores(self, scores: Tensor) -> Tensor:
        """Return the scores, with -inf at entries that must be pruned."""
        return scores

    def addable(self, mask: Tensor) -> Tensor:
        """Return the mask of the entries outside a support that may be added to it."""
        return ~mask


@dataclass(frozen=True)
class Unstructured(_PatternDefaults):
    """Prune a fraction of a layer's weights, at any positions.

    Attributes:
        sparsity: fraction of zeros, in [0, 1).

    Raises:
        ConfigError: if the fraction is outside [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"Sparsity {self.sparsity:g} is outside [0, 1): give the fraction of weights to remove, e.g. 0.7."
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def pruned_count(self, entries: int) -> int:
        """Return how many of `entries` weights become zero: round(sparsity * entries)."""
        return round(self.sparsity * entries)

    def fits(self, in_size: int) -> bool:  # noqa: ARG002 - part of the shared interface
        """Return True: rows of any length can have this pattern."""
        return True

    @property
    def keeps_all(self) -> bool:
        """True if the pattern prunes nothing."""
        return self.sparsity == 0

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask (out, in) of the entries with the largest scores, which are not negative."""
        return keep_largest(scores, self)


@dataclass(frozen=True)
class SemiStructured(_PatternDefaults):
    """Keep `keep` of every `group` consecutive inputs of a row (N:M; 2:4 keeps two of four).

    Raises:
        ConfigError: unless 1 <= keep < group.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise ConfigError(
                f"Pattern {self.keep}:{self.group} keeps {self.keep} of every {self.group} weights, which needs "
                "1 <= N < M: write N:M with the number KEPT first, e.g. 2:4."
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.keep / self.group

    def pruned_count(self, entries: int) -> int:
        """Return how many of `entries` weights, a multiple of the group, become zero."""
        return entries // self.group * (self.group - self.keep)

    def fits(self, in_size: int) -> bool:
        """Return whether rows of `in_size` weights split into whole groups."""
        return in_size % self.group == 0

    @property
    def keeps_all(self) -> bool:
        """False: with N < M something is always pruned."""
        return False

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask (out, in) of the entries with the largest scores, which are not negative."""
        return keep_largest(scores, self)


@dataclass(frozen=True, eq=False)
class MaskedPattern:
    """A pattern on one matrix whose zeros must stay zero and count as pruned.

    If the matrix, or a group, has no more nonzeros than the pattern keeps, all of them are kept.

    Attributes:
        base: the pattern without the mask.
        allowed: entries that may be kept, shape (out, in), boolean.
    """

    base: Unstructured | SemiStructured
    allowed: Tensor

    def __str__(self) -> str:
        return str(self.base)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept / self.allowed.numel()

    @cached_property
    def kept(self) -> int:
        """Number of entries that are kept."""
        entries = self.allowed.numel()
        if isinstance(self.base, SemiStructured):
            return int(self.allowed.reshape(-1, self.base.group).sum(dim=1).clamp_max(self.base.keep).sum())
        return min(entries - self.base.pruned_count(entries), int(self.allowed.sum()))

    def pruned_count(self, entries: int) -> int:
        """Return how many weights of the matrix are zero after pruning."""
        assert entries == self.allowed.numel()
        return entries - self.kept

    def fits(self, in_size: int) -> bool:
        """Return whether rows of `in_size` weights can have this pattern."""
        return self.allowed.shape[1] == in_size and self.base.fits(in_size)

    @property
    def keeps_all(self) -> bool:
        """False: some entries must stay zero."""
        return False

    @property
    def is_satisfied(self) -> bool:
        """True if the matrix has enough zeros already, so that every nonzero is kept."""
        return self.kept == int(self.allowed.sum())

    def part(self, rows: slice, columns: slice) -> MaskedPattern:
        """Return the pattern on some rows and some columns of the matrix."""
        return MaskedPattern(self.base, self.allowed[rows, columns])

    def mask_scores(self, scores: Tensor) -> Tensor:
        """Return the scores, with -inf at entries that must be pruned."""
        return scores.masked_fill(~self.allowed, -float("inf"))

    def addable(self, mask: Tensor) -> Tensor:
        """Return the mask of the entries outside a support that may be added to it."""
        return self.allowed & ~mask

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask (out, in) of the entries with the largest scores, which are not negative."""
        return keep_largest(scores, self)


Pattern = Unstructured | SemiStructured | MaskedPattern


def restrict_to_nonzeros(pattern: Unstructured | SemiStructured, weight: Tensor) -> Pattern:
    """Return a pattern under which the zeros of a weight (out, in) stay zero; `pattern` itself if there are none."""
    allowed = weight != 0
    return pattern if bool(allowed.all()) else MaskedPattern(pattern, allowed)


def parse_pattern(text: str) -> Unstructured | SemiStructured:
    """Parse a pattern written as `0.7`, `70%` or `2:4`.

    Raises:
        ConfigError: if the text has none of these forms, or a number is out of range.
    """
    if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return SemiStructured(int(match[1]), int(match[2]))
    try:
        return Unstructured(float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1))
    except ValueError:
        raise ConfigError(
            f"Pattern '{text}' is not understood: write a fraction such as 0.7, or N:M such as 2:4."
        ) from None


def keep_largest(scores: Tensor, pattern: Pattern, scope: Scope = "matrix") -> Tensor:
    """Select the entries with the largest scores under a pattern.

    Args:
        scores: shape (out, in), any float dtype, no NaN.
        pattern: the sparsity pattern; an N:M pattern ignores `scope`.
        scope: `matrix` compares all entries of the matrix, `row` those of each row. Numbers of kept entries per row
            differ by at most one, so that their sum is exactly that of the matrix.

    Returns:
        Boolean mask, shape (out, in), True = kept; exactly `pattern.pruned_count` entries are False.
    """
    assert scores.ndim == 2
    scores = pattern.mask_scores(scores)
    if isinstance(base := pattern.base, SemiStructured):
        mask = topk_in_groups(scores, base.keep, base.group)
        return mask.logical_and_(pattern.allowed) if isinstance(pattern, MaskedPattern) else mask
    if scope == "row":
        return topk_in_rows(scores, _row_counts(scores, pattern))
    kept = scores.numel() - pattern.pruned_count(scores.numel())
    return topk_mask(scores.reshape(-1), kept).reshape(scores.shape)


def _row_counts(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the number of entries to keep in each row, shape (rows,)."""
    rows, columns = scores.shape
    pruned = pattern.base.pruned_count(scores.numel())
    kept = columns - (torch.arange(rows + 1, device=scores.device) * pruned // rows).diff()
    return redistribute(kept, pattern.allowed.sum(dim=1)) if isinstance(pattern, MaskedPattern) else kept


# N:M patterns searched for in a directory without a report.
USUAL_PATTERNS = (SemiStructured(2, 4), SemiStructured(4, 8), SemiStructured(1, 4), SemiStructured(8, 16))


def group_violations(weight: Tensor, pattern: SemiStructured) -> tuple[int, int]:
    """Count the groups of a weight (out, in), and those with too many nonzeros.

    If the group does not divide the number of inputs, all groups count as violations.
    """
    rows, columns = weight.shape
    if not pattern.fits(columns):
        groups = rows * -(-columns // pattern.group)
        return groups, groups
    kept = (weight.reshape(-1, pattern.group) != 0).sum(dim=1)
    return len(kept), int(torch.count_nonzero(kept > pattern.keep))
