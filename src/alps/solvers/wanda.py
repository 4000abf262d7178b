"""Wanda: keep the weights with the largest |W_ij| ||X_j||, compared within each output row.

Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
arXiv 2306.11695, Equation 1 (score) and Section 3 (comparison group: one output). Kept weights are unchanged.
Numbers of pruned entries per row differ by at most one, so that the total of the matrix is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution, SolveInfo
from alps.solvers.patterns import Pattern, keep_largest


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the entries with the largest |W_ij| ||X_j|| of each row."""

    @property
    def name(self) -> str:
        return "wanda"

    @property
    def needs(self) -> Needs:
        return Needs.MOMENTS

    @property
    def by_rows(self) -> bool:
        return True

    def prepare(self, stats: InputStats) -> Tensor:
        return stats.norms()

    def prune_matrix(self, weight: Tensor, state: Tensor, pattern: Pattern) -> Solution:
        info = SolveInfo()
        with info.timed("select"):
            mask = keep_largest(weight.abs() * state, pattern, scope="row")
        return Solution(weight, mask, info)
