"""Relative reconstruction error of a pruned layer, computed from the Gram of its inputs.

legend  W      dense weight                     (out, in)
        W_hat  pruned weight                    (out, in)
        G      Gram of the inputs, X^T X        (in, in)
ALPS (arXiv 2406.07831), the relative error of Table 1:
        ||X (W_hat - W)^T||_F^2 / ||X W^T||_F^2 = tr(D G D^T) / tr(W G W^T),  D = W_hat - W
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alps.core.statistics import InputStats


def relative_errors(pruned: Sequence[Tensor], dense: Tensor, stats: InputStats) -> list[float]:
    """Return the relative reconstruction error of each pruned weight, all (out, in); 0 if the dense output is 0."""
    reference = stats.energy(dense)
    return [stats.energy(weight - dense) / reference if reference > 0 else 0.0 for weight in pruned]


def relative_error(pruned: Tensor, dense: Tensor, stats: InputStats) -> float:
    """Return the relative reconstruction error of one pruned weight; 0 if the dense output is 0."""
    return relative_errors([pruned], dense, stats)[0]
