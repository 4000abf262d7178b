"""Comparison of two models: weights bit by bit, predictions by the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Check that the names and every bit of the tensors agree."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])

    return one.keys() == other.keys() and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def mean_kl(dense: nn.Module, pruned: nn.Module, ids: Tensor) -> float:
    """Return the mean KL divergence of `pruned` from `dense` over the tokens, from its definition, in float64."""
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())
