"""Which weights may stay: sparsity patterns, and the selection of the best entries under one.

Everything here is exact in count. Entries are selected by rank, with ties broken by position, never by
comparing against a threshold alone: a ratio of 0.7 prunes exactly round(0.7 n) entries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.solvers.topk import capped, topk_in_groups, topk_in_rows
from alps.solvers.topk import topk_mask as topk_mask

Scope = Literal["matrix", "row"]


class _Anywhere:
    """Defaults for patterns that may keep any entry of a matrix; `MaskedPattern` overrides them."""

    @property
    def base(self) -> Self:
        """The pattern itself."""
        return self

    def part(self, rows: slice, columns: slice) -> Self:  # noqa: ARG002 - part of the shared interface
        """The pattern on some rows and some columns of the matrix."""
        return self

    def limited(self, scores: Tensor) -> Tensor:
        """The scores, -inf where an entry must not stay."""
        return scores

    def free(self, mask: Tensor) -> Tensor:
        """Entries outside a support that may enter it."""
        return ~mask


@dataclass(frozen=True)
class Unstructured(_Anywhere):
    """Prune a fraction of a site's weights, wherever they are.

    Attributes:
        sparsity: fraction of zeros, in [0, 1).

    Raises:
        ConfigError: when the fraction lies outside [0, 1).
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
        """How many of `entries` weights become zero: round(sparsity * entries)."""
        return round(self.sparsity * entries)

    def fits(self, in_size: int) -> bool:  # noqa: ARG002 - part of the shared interface
        """Whether rows of `in_size` weights can take this pattern."""
        return True

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be pruned."""
        return self.sparsity == 0


@dataclass(frozen=True)
class SemiStructured(_Anywhere):
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
        """How many of `entries` weights (a multiple of the group) become zero."""
        return entries // self.group * (self.group - self.keep)

    def fits(self, in_size: int) -> bool:
        """Whether rows of `in_size` weights split into whole groups."""
        return in_size % self.group == 0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be pruned: never, for N < M."""
        return False


@dataclass(frozen=True, eq=False)
class MaskedPattern:
    """A pattern on one matrix of which some entries are zero already, stay so, and count as pruned.

    Where no more entries may stay than the pattern keeps, in the matrix or in a group, all of them stay.

    Attributes:
        base: the pattern.
        allowed: entries that may stay, shape (out, in), boolean.
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
        """How many entries stay."""
        entries = self.allowed.numel()
        if isinstance(self.base, SemiStructured):
            return int(self.allowed.reshape(-1, self.base.group).sum(dim=1).clamp_max(self.base.keep).sum())
        return min(entries - self.base.pruned_count(entries), int(self.allowed.sum()))

    def pruned_count(self, entries: int) -> int:
        """How many of the matrix's weights are zero in the end."""
        assert entries == self.allowed.numel()
        return entries - self.kept

    def fits(self, in_size: int) -> bool:
        """Whether rows of `in_size` weights can take this pattern."""
        return self.allowed.shape[1] == in_size and self.base.fits(in_size)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be pruned: never, where something must stay zero."""
        return False

    @property
    def settled(self) -> bool:
        """Whether there are zeros enough, so that all that may stay does."""
        return self.kept == int(self.allowed.sum())

    def part(self, rows: slice, columns: slice) -> MaskedPattern:
        """The pattern on some rows and some columns of the matrix."""
        return MaskedPattern(self.base, self.allowed[rows, columns])

    def limited(self, scores: Tensor) -> Tensor:
        """The scores, -inf where an entry must not stay."""
        return scores.masked_fill(~self.allowed, -float("inf"))

    def free(self, mask: Tensor) -> Tensor:
        """Entries outside a support that may enter it."""
        return self.allowed & ~mask


Pattern = Unstructured | SemiStructured | MaskedPattern


def restrict_to_nonzeros(pattern: Unstructured | SemiStructured, weight: Tensor) -> Pattern:
    """A pattern under which the zeros of a weight (out, in) stay zero; the pattern itself where it has none."""
    allowed = weight != 0
    return pattern if bool(allowed.all()) else MaskedPattern(pattern, allowed)


def parse_pattern(text: str) -> Unstructured | SemiStructured:
    """Read `0.7`, `70%` or `2:4`.

    Raises:
        ConfigError: when the text is none of these or its numbers are out of range.
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
    """Select the entries with the largest scores that the pattern lets stay.

    Args:
        scores: shape (out, in), any float dtype, no NaN.
        pattern: what must be kept; an N:M pattern ignores `scope`.
        scope: whether an unstructured budget is one for the whole matrix or one for every row. Row budgets
            differ by at most one entry, so that the total is that of the matrix to the entry.

    Returns:
        Boolean mask, shape (out, in), True = kept; exactly `pattern.pruned_count` entries are False.
    """
    assert scores.ndim == 2
    scores = pattern.limited(scores)
    if isinstance(base := pattern.base, SemiStructured):
        mask = topk_in_groups(scores, base.keep, base.group)
        return mask.logical_and_(pattern.allowed) if isinstance(pattern, MaskedPattern) else mask
    if scope == "row":
        return topk_in_rows(scores, _row_counts(scores, pattern))
    kept = scores.numel() - pattern.pruned_count(scores.numel())
    return topk_mask(scores.reshape(-1), kept).reshape(scores.shape)


def _row_counts(scores: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = scores.shape
    pruned = pattern.base.pruned_count(scores.numel())
    kept = columns - (torch.arange(rows + 1, device=scores.device) * pruned // rows).diff()
    return capped(kept, pattern.allowed.sum(dim=1)) if isinstance(pattern, MaskedPattern) else kept


# Patterns looked for in a directory that has no report of its own.
USUAL_PATTERNS = (SemiStructured(2, 4), SemiStructured(4, 8), SemiStructured(1, 4), SemiStructured(8, 16))


def group_violations(weight: Tensor, pattern: SemiStructured) -> tuple[int, int]:
    """Groups of a weight (out, in), and those with too many nonzeros; a width that does not divide counts whole."""
    rows, columns = weight.shape
    if not pattern.fits(columns):
        groups = rows * -(-columns // pattern.group)
        return groups, groups
    kept = (weight.reshape(-1, pattern.group) != 0).sum(dim=1)
    return len(kept), int(torch.count_nonzero(kept > pattern.keep))
