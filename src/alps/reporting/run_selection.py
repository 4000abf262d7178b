"""What of the results a page shows where it cannot show all: which pattern first, and which run of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alps.reporting.compare_results import DENSE, Result


@dataclass(frozen=True)
class Runs:
    """Results of one comparison, or of one run."""

    results: Sequence[Result]

    @property
    def dense(self) -> Result | None:
        """The dense model's, if it was measured."""
        return next((result for result in self.results if result.method == DENSE), None)

    @property
    def pruned(self) -> list[Result]:
        """All others."""
        return [result for result in self.results if result.method != DENSE]

    @property
    def methods(self) -> list[str]:
        """In the order of the results; a method has the same colour everywhere."""
        return list(dict.fromkeys(result.method for result in self.pruned))

    @property
    def seeds(self) -> list[int]:
        """All of them, in order."""
        return sorted({result.seed for result in self.pruned if result.seed is not None})

    @property
    def ratios(self) -> list[str]:
        """Patterns that are a share of zeros and no N:M, the smallest first."""
        shares = {result.pattern: result.sparsity for result in self.pruned if ":" not in result.pattern}
        return sorted(shares, key=lambda pattern: (shares[pattern], pattern))

    @property
    def groups(self) -> list[str]:
        """N:M patterns in the order of the results."""
        return list(dict.fromkeys(result.pattern for result in self.pruned if ":" in result.pattern))

    @property
    def patterns(self) -> list[str]:
        """All of them, the one to show first in front: the middle ratio, or the first N:M where there is none."""
        if not self.ratios:
            return self.groups
        middle = self.ratios[len(self.ratios) // 2]
        return [middle, *(pattern for pattern in [*self.ratios, *self.groups] if pattern != middle)]

    def select(self, method: str, pattern: str) -> list[Result]:
        """All seeds of one combination."""
        return [result for result in self.pruned if (result.method, result.pattern) == (method, pattern)]

    def first(self, pattern: str) -> list[Result]:
        """The first seed of every method at a pattern."""
        return [found[0] for method in self.methods if (found := self.select(method, pattern))]
