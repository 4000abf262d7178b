"""Which weights may stay: sparsity patterns, and the selection of the best entries under one.

Everything here is exact in count. Entries are selected by rank, with ties broken by position, never by
comparing against a threshold alone: a ratio of 0.7 prunes exactly round(0.7 n) entries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alps.errors import ConfigError
from alps.solvers.selection import chunk_of
from alps.solvers.selection import top_mask as top_mask

Scope = Literal["matrix", "row"]


@dataclass(frozen=True)
class Unstructured:
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
class SemiStructured:
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


Pattern = Unstructured | SemiStructured


def parse_pattern(text: str) -> Pattern:
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
    if isinstance(pattern, SemiStructured):
        return _keep_in_groups(scores, pattern)
    if scope == "row":
        return _keep_in_rows(scores, pattern)
    kept = scores.numel() - pattern.pruned_count(scores.numel())
    return top_mask(scores.reshape(-1), kept).reshape(scores.shape)


def _keep_in_rows(scores: Tensor, pattern: Unstructured) -> Tensor:
    rows, columns = scores.shape
    pruned = pattern.pruned_count(scores.numel())
    edges = torch.arange(rows + 1, device=scores.device) * pruned // rows
    kept = columns - edges.diff()
    order = scores.argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(columns, device=scores.device) < kept[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, inside)


def _keep_in_groups(scores: Tensor, pattern: SemiStructured) -> Tensor:
    assert pattern.fits(scores.shape[1])
    groups = scores.reshape(-1, pattern.group)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    size = max(chunk_of(scores) // pattern.group, 1)
    for part, answer in zip(torch.split(groups, size), torch.split(mask, size), strict=True):
        # One contiguous row for each place in a group, so that every comparison runs over whole rows.
        answer.copy_(_ranks(part.T.contiguous()).lt_(pattern.keep).T)
    return mask.reshape(scores.shape)


def _ranks(places: Tensor) -> Tensor:
    """How many other places of its group beat each entry of `places` (group, groups); equals lose to their left."""
    group = len(places)
    # Until it is compared, a place counts as beaten by every place to its right.
    rank = torch.arange(group - 1, -1, -1, device=places.device, dtype=torch.float32)[:, None]
    rank = rank.repeat(1, places.shape[1])
    loses = torch.empty_like(rank[0])
    for i in range(group):
        for j in range(i):
            torch.ge(places[j], places[i], out=loses)
            rank[i].add_(loses)
            rank[j].sub_(loses)
    return rank
