"""The layer objective: how far a pruned map's outputs are from the dense ones, from the Gram alone.

legend  W      dense weight                     (out, in)
        W_hat  pruned weight                    (out, in)
        G      Gram of the inputs, X^T X        (in, in)
ALPS (arXiv 2406.07831), the relative error of Table 1:
        ||X (W_hat - W)^T||_F^2 / ||X W^T||_F^2 = tr(D G D^T) / tr(W G W^T),  D = W_hat - W
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy(delta: Tensor, gram: Tensor) -> float:
    """||X delta^T||_F^2 = tr(delta G delta^T) for delta (out, in); products in the inputs' dtype, sum in float64."""
    return float(((delta @ gram) * delta).sum(dtype=torch.float64).clamp_min(0))


def relative_error(pruned: Tensor, dense: Tensor, gram: Tensor) -> float:
    """Relative reconstruction error of `pruned` against `dense`, both (out, in); 0 when the dense output is 0."""
    reference = energy(dense, gram)
    return energy(pruned - dense, gram) / reference if reference > 0 else 0.0
