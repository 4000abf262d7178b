"""Comparison of two models: weights bit by bit, predictions by the KL divergence, outputs by the relative error."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from alps.models.blocks import find_blocks


def bits(tensor: Tensor) -> Tensor:
    """View floating-point numbers as integers, so that -0.0 differs from +0.0."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all layers by name, (out, in)."""
    return {site.name: site.read() for block in find_blocks(model) for site in block.sites}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Check that the names and every bit of the tensors agree."""
    return one.keys() == other.keys() and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def same_models(one: nn.Module, other: nn.Module) -> bool:
    """Check that the names and every bit of the parameters agree."""
    return same(weights(one), weights(other))


def mean_kl(dense: nn.Module, pruned: nn.Module, ids: Tensor) -> float:
    """Return the mean KL divergence of `pruned` from `dense` over the tokens, from its definition, in float64."""
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


def output_error(dense: Tensor, pruned: Tensor, x: Tensor) -> float:
    """Return ||X (W_hat - W)^T||^2 / ||X W^T||^2 from the inputs X (tokens, in) themselves, in float64."""
    W, W_hat = dense.double(), pruned.double()
    return float((x.double() @ (W_hat - W).T).square().sum() / (x.double() @ W.T).square().sum())


def tree(folder: Path) -> list[str]:
    """List everything below a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
