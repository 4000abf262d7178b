"""Selection of runs for pages that cannot show all: the pattern to show first, and one run of several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from alps.reporting.compare_results import DENSE, Result


@dataclass(frozen=True)
class Runs:
    """Results of one comparison, or of one run."""

    results: Sequence[Result]

    @property
    def dense(self) -> Result | None:
        """Result of the dense model; None if it was not measured."""
        return next((result for result in self.results if result.method == DENSE), None)

    @property
    def pruned(self) -> list[Result]:
        """Results of the pruned models."""
        return [result for result in self.results if result.method != DENSE]

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the results. The index of a method decides its colour in all figures."""
        return list(dict.fromkeys(result.method for result in self.pruned))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the pruned models in ascending order."""
        return sorted({result.seed for result in self.pruned if result.seed is not None})

    @property
    def ratios(self) -> list[str]:
        """Unstructured patterns, the lowest sparsity first."""
        sparsities = {result.pattern: result.sparsity for result in self.pruned if ":" not in result.pattern}
        return sorted(sparsities, key=lambda pattern: (sparsities[pattern], pattern))

    @property
    def groups(self) -> list[str]:
        """N:M patterns in the order of the results."""
        return list(dict.fromkeys(result.pattern for result in self.pruned if ":" in result.pattern))

    @property
    def patterns(self) -> list[str]:
        """All patterns, the one to show first in front: the middle sparsity, or the first N:M if there is none."""
        if not self.ratios:
            return self.groups
        middle = self.ratios[len(self.ratios) // 2]
        return [middle, *(pattern for pattern in [*self.ratios, *self.groups] if pattern != middle)]

    def select(self, method: str, pattern: str) -> list[Result]:
        """Return the results of all seeds for a method and a pattern."""
        return [result for result in self.pruned if (result.method, result.pattern) == (method, pattern)]

    def perplexities(self, method: str, pattern: str, i: int) -> list[float]:
        """Return the perplexities of all seeds on text `i`, without those that are too large for a number."""
        rows = [result.evaluations[i] for result in self.select(method, pattern) if i < len(result.evaluations)]
        return [row.perplexity for row in rows if math.isfinite(row.perplexity)]

    def dense_perplexity(self, i: int) -> float | None:
        """Return the perplexity of the dense model on text `i`; None if it is too large or was not measured."""
        value = math.inf if self.dense is None else self.dense.evaluations[i].perplexity
        return value if math.isfinite(value) else None

    def first_seeds(self, pattern: str) -> list[Result]:
        """Return the first seed's result of every method at a pattern."""
        by_method = [self.select(method, pattern) for method in self.methods]
        return [results[0] for results in by_method if results]
