"""Kullback-Leibler divergence between the next-token distributions of two models, computed in chunks of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits that are converted to float32 at once: 16 MB of each model.
_CHUNK = 2**22


def kl_divergence(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """Return the sum over rows of KL(softmax(target) || softmax(logits)) in nats, divided by `count`.

    Differentiable in `logits` only. Logits are read in chunks, so that no float32 copy of all rows exists. The
    gradient, (softmax(logits) - softmax(target)) / count, is computed in the same pass, in the dtype of the logits.

    Args:
        logits: of the student, shape (rows, vocabulary), any float dtype, finite.
        target: logits of the teacher, same shape; it gets no gradient.
        count: divisor; the rows of the whole batch when a batch is passed in several calls.

    Returns:
        Scalar; float64 for float64 logits, else float32.
    """
    assert logits.ndim == 2 and logits.shape == target.shape and count > 0
    divergence: Tensor = _ChunkedKL.apply(logits, target, count)  # type: ignore[no-untyped-call]
    return divergence


class _ChunkedKL(torch.autograd.Function):
    """Divergence of all rows, with its gradient computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, count: int) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        size = max(_CHUNK // logits.shape[1], 1)
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            student = logits[part].to(exact).log_softmax(dim=1)
            teacher = target[part].to(exact).log_softmax(dim=1)
            probabilities = teacher.exp()
            total += teacher.sub_(student).mul_(probabilities).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = student.exp_().sub_(probabilities).div_(count)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / count).to(exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
