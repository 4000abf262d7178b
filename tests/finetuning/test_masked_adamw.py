"""Masked training against torch's own Adam on whole tensors, and what it may not touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alps.finetuning.masked_adamw import MaskedAdamW, TrainableParameter


def _linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(6, 5)
    mask = torch.rand(5, 6, generator=generator) < 0.4
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 6, generator=generator) * mask)
        layer.weight[~mask] = torch.where(torch.arange(int((~mask).sum())) % 2 == 0, 0.0, -0.0)
    return layer.to(dtype), mask


def _inputs(step: int, part: int) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(10 * step + part))


def test_steps_are_those_of_adam_on_masked_gradients_of_a_whole_batch() -> None:
    layer, mask = _linear()
    weight, bias = (p.detach().double().requires_grad_() for p in layer.parameters())
    adam = torch.optim.Adam([weight, bias], lr=0.03, betas=(0.9, 0.95))
    tuned = [TrainableParameter(layer.weight, mask, torch.float32), TrainableParameter(layer.bias, None, torch.float32)]
    signs = torch.signbit(layer.weight.detach())
    with MaskedAdamW(layer, tuned, 0.03) as masters:
        for step in range(4):
            loss = torch.zeros((), dtype=torch.float64)
            for part in range(2):
                layer(_inputs(step, part)).square().sum().backward()
                loss = loss + nn.functional.linear(_inputs(step, part).double(), weight, bias).square().sum()
            assert layer.weight.grad is None
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            assert weight.grad is not None
            weight.grad *= mask
            norm = torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
            assert float(norm) > 1.0
            adam.param_groups[0]["lr"] = 0.03 * (1 - step / 4)
            adam.step()
            assert masters.step(1 - step / 4)
            torch.testing.assert_close(layer.weight.double(), weight.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.bias.double(), bias.detach(), rtol=1e-5, atol=1e-6)
        assert masters.entries == int(mask.sum()) + 5
    assert torch.equal(layer.weight == 0, ~mask)
    assert torch.equal(torch.signbit(layer.weight)[~mask], signs[~mask])


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
def test_the_mean_gradient_of_several_passes_is_taken(sums: torch.dtype) -> None:
    """Steps of unequal numbers of passes, below the clip: sums would weigh otherwise in the moments."""
    layer, mask = _linear()
    weight = layer.weight.detach().double().requires_grad_()
    adam = torch.optim.Adam([weight], lr=0.03, betas=(0.9, 0.95))
    with MaskedAdamW(layer, [TrainableParameter(layer.weight, mask, torch.float32)], 0.03, sums) as masters:
        for step, passes in enumerate((3, 1, 2)):
            weight.grad = torch.zeros_like(weight)
            for part in range(passes):
                (1e-2 * layer(_inputs(step, part)).sum()).backward()
                weight.grad += 1e-2 * _inputs(step, part).double().sum(dim=0) * mask / passes
            assert float(weight.grad.norm()) < 1
            adam.step()
            assert masters.step(1.0, passes)
            torch.testing.assert_close(layer.weight.double(), weight.detach(), rtol=1e-5, atol=1e-6)


def test_small_steps_add_up_below_the_precision_of_bfloat16() -> None:
    layer, mask = _linear(torch.bfloat16)
    before = layer.weight.detach().clone()
    with MaskedAdamW(layer, [TrainableParameter(layer.weight, mask, torch.bfloat16)], 1e-4) as masters:
        for step in range(200):
            layer(torch.ones(1, 6, dtype=torch.bfloat16)).sum().backward()
            assert masters.step(1.0)
            if step == 0:
                first = layer.weight.detach().clone()
    moved = (layer.weight.detach() - before)[mask]
    assert int((first != before).sum()) < int(mask.sum()) / 2
    torch.testing.assert_close(moved.float(), torch.full_like(moved, -0.02).float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kept_weight_that_reaches_zero_stays_out_of_the_count(stored: torch.dtype) -> None:
    layer, mask = _linear()
    tuned = TrainableParameter(layer.weight, mask, stored)
    values = tuned.round(torch.zeros(int(mask.sum())))
    assert values.dtype is stored and bool((values != 0).all()) and float(values.float().max()) < 1e-4
    tuned.scatter(values)
    assert torch.equal(layer.weight == 0, ~mask)
    assert bool((TrainableParameter(layer.bias, None, stored).round(torch.zeros(5)) == 0).all())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    layer, mask = _linear()
    before = layer.weight.detach().clone()
    with MaskedAdamW(layer, [TrainableParameter(layer.weight, mask, torch.float32)], 0.1) as masters:
        (layer(torch.ones(1, 6)).sum() * torch.inf).backward()
        assert not masters.step(1.0)
    assert torch.equal(layer.weight, before)


def test_a_snapshot_comes_back_and_the_model_takes_gradients_as_before() -> None:
    layer, mask = _linear()
    layer.bias.requires_grad_(False)
    before = layer.weight.detach().clone()
    with MaskedAdamW(layer, [TrainableParameter(layer.weight, mask, torch.float32)], 0.1) as masters:
        kept = masters.snapshot()
        layer(_inputs(0, 0)).square().sum().backward()
        assert masters.step(1.0) and not torch.equal(layer.weight, before)
        masters.restore(kept)
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    layer(_inputs(0, 0)).sum().backward()
    assert layer.weight.grad is not None


def test_a_site_without_kept_weights_is_passed_over() -> None:
    layer, mask = _linear()
    with MaskedAdamW(
        layer,
        [
            TrainableParameter(layer.weight, torch.zeros_like(mask), torch.float32),
            TrainableParameter(layer.bias, None, torch.float32),
        ],
        0.1,
    ) as masters:
        layer(_inputs(0, 0)).square().sum().backward()
        assert masters.step(1.0) and masters.entries == 5
