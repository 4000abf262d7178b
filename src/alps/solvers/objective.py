"""The layer objective: how far a pruned map's outputs are from the dense ones, from the Gram alone.

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
    """Relative reconstruction errors of `pruned` against `dense`, all (out, in); 0 when the dense output is 0."""
    reference = stats.energy(dense)
    return [stats.energy(one - dense) / reference if reference > 0 else 0.0 for one in pruned]


def relative_error(pruned: Tensor, dense: Tensor, stats: InputStats) -> float:
    """`relative_errors` of one matrix."""
    return relative_errors([pruned], dense, stats)[0]
