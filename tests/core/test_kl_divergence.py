"""The divergence in pieces against one that autograd takes through all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core import kl_divergence as divergence
from alps.core.kl_divergence import kl_divergence


def naive(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """Row by row, from the definition, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for own, reference in zip(logits.double(), target.double(), strict=True):
        p, q = reference.softmax(0), own.softmax(0)
        total = total + (p * (p.log() - q.log())).sum()
    return total / count


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    own, reference = (3 * torch.randn(11, 37, generator=generator, dtype=torch.float64) for _ in range(2))
    return own.to(dtype).requires_grad_(), reference.to(dtype).requires_grad_()


@pytest.mark.parametrize("rows_at_once", [1, 4, 11, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_value_and_gradient_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, rows_at_once: int
) -> None:
    monkeypatch.setattr(divergence, "_CHUNK", 37 * rows_at_once)
    own, reference = problem(dtype)
    expected = naive(own, reference, 13)
    (slope,) = torch.autograd.grad(3 * expected, own, retain_graph=True)
    result = kl_divergence(own, reference, 13)
    assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=min(tolerance, 1e-6), atol=0)
    (3 * result).backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None and own.grad.dtype is dtype and reference.grad is None
    torch.testing.assert_close(own.grad.double(), slope.double(), rtol=tolerance, atol=tolerance * 1e-2)


def test_equal_logits_have_no_divergence_and_a_shift_of_a_row_changes_nothing() -> None:
    own, reference = problem(torch.float64)
    assert float(kl_divergence(own.detach(), own.detach(), 1)) == 0.0
    shifted = own.detach() + torch.arange(11.0)[:, None]
    torch.testing.assert_close(kl_divergence(shifted, reference, 1), kl_divergence(own, reference, 1))


def test_it_is_the_dense_model_that_weights_the_tokens() -> None:
    own, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.9, 0.1]]).log()
    assert float(kl_divergence(own, reference, 1)) == pytest.approx(0.36806, abs=1e-5)
    assert float(kl_divergence(reference, own, 1)) == pytest.approx(0.51083, abs=1e-5)
