"""Models to be packed: pruned by magnitude, and asked for their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def prune(model: nn.Module, sparsity: float = 0.7) -> None:
    """Set the smallest weights of every matrix outside embeddings and head to zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "emb" not in name and "head" not in name and "wte" not in name and "wpe" not in name:
            order = parameter.data.abs().float().flatten().argsort()
            parameter.data.view(-1)[order[: round(sparsity * len(order))]] = 0


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result
