"""Magnitude pruning: remove the smallest weights of a layer, and leave the others unchanged.

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015,
arXiv 1506.02626, with one threshold for each matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution, SolveInfo
from alps.solvers.patterns import Pattern, keep_largest


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the entries with the largest |W|, compared over the whole matrix."""

    @property
    def name(self) -> str:
        return "magnitude"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def prepare(self, stats: InputStats) -> None:  # noqa: ARG002 - the method does not read the inputs
        return None

    def prune_matrix(self, weight: Tensor, state: None, pattern: Pattern) -> Solution:  # noqa: ARG002
        info = SolveInfo()
        with info.timed("select"):
            mask = keep_largest(weight.abs(), pattern)
        return Solution(weight, mask, info)
