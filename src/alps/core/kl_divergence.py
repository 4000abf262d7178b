"""Kullback-Leibler divergence between two models' next-token distributions, a few rows of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits in float32 at once: 16 MB of each kind.
_CHUNK = 2**22


def kl_divergence(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """Sum over rows of KL(softmax(target) || softmax(logits)), in nats, divided by `count`.

    Differentiable in `logits` only. Both are read in pieces: float32 copies of all rows never exist at once, and the
    gradient, (softmax(logits) - softmax(target)) / count, is written in the dtype of the logits while they are read.

    Args:
        logits: of the model that learns, (rows, vocabulary), any float dtype, finite.
        target: of the model that teaches, the same shape; no gradient reaches it.
        count: what to divide by: the rows of all parts of a batch that is fed in parts.

    Returns:
        Scalar; float64 for float64 logits, else float32.
    """
    assert logits.ndim == 2 and logits.shape == target.shape and count > 0
    divergence: Tensor = _ChunkedKL.apply(logits, target, count)  # type: ignore[no-untyped-call]
    return divergence


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, count: int) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        size = max(_CHUNK // logits.shape[1], 1)
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            own = logits[part].to(exact).log_softmax(dim=1)
            wanted = target[part].to(exact).log_softmax(dim=1)
            probabilities = wanted.exp()
            total += wanted.sub_(own).mul_(probabilities).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = own.exp_().sub_(probabilities).div_(count)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / count).to(exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
