"""One bit per weight: the zeros of a parameter, applied to weights and gradients to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alps.core.errors import UnsupportedModel
from alps.finetuning.zero_mask import ZeroMask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Holder(nn.Module):
    """A module with one parameter, of any shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(shape, generator=generator) < 0.4
    zeros = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0)
    return torch.where(mask, torch.randn(shape, generator=generator), zeros).to(dtype), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 44), (3, 64), (4, 6, 33)])
def test_kept_entries_keep_their_bits_and_the_others_become_plus_zero(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, mask = drawn(shape, dtype)
    holder = Holder(weight.clone())
    zeros = ZeroMask("layer.weight", holder, "weight")
    assert (zeros.entries, zeros.zeros) == (mask.numel(), int((~mask).sum()))
    assert zeros.nbytes == mask[..., 0].numel() * -(-shape[-1] // 32) * 4
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    noise[..., 0] = torch.nan
    expected = torch.where(mask, noise, torch.zeros((), dtype=dtype))
    assert torch.equal(zeros.applied_to(noise).nan_to_num(7), expected.nan_to_num(7))
    with torch.no_grad():
        holder.weight.copy_(noise)
    zeros.apply()
    assert torch.equal(holder.weight.nan_to_num(7), expected.nan_to_num(7))
    assert not torch.signbit(holder.weight[~mask]).any() and holder.weight.requires_grad


def test_gradients_of_another_dtype_or_layout_are_masked() -> None:
    weight, mask = drawn((6, 40))
    zeros = ZeroMask("layer.weight", Holder(weight).bfloat16(), "weight")
    gradient = torch.randn(40, 6, dtype=torch.float32).T
    assert torch.equal(zeros.applied_to(gradient), gradient * mask)


def test_a_kept_weight_that_passes_through_zero_moves_on() -> None:
    weight, mask = drawn((3, 8))
    holder = Holder(weight)
    zeros = ZeroMask("layer.weight", holder, "weight")
    with torch.no_grad():
        holder.weight.zero_()
    zeros.apply()
    with torch.no_grad():
        holder.weight.add_(1)
    zeros.apply()
    assert torch.equal(holder.weight != 0, mask)


def test_a_replaced_parameter_is_noticed_and_a_dead_module_is_not() -> None:
    holder = Holder(drawn((3, 8))[0])
    zeros = ZeroMask("model.layer.weight", holder, "weight")
    holder.weight = nn.Parameter(torch.zeros(24))
    with pytest.raises(UnsupportedModel, match=r"zeros of model\.layer\.weight cannot be kept, since it was replaced"):
        zeros.apply()
    del holder
    zeros.apply()
    assert zeros.parameter is None
