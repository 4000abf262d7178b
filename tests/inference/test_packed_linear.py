"""Tests of packed layers against dense ones, with the kernel and with torch only."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alps.checkpoints.bitmask_codec import pack
from alps.inference import packed_linear as linear
from alps.inference.packed_linear import PackedLinear

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def layers(
    dtype: torch.dtype = torch.float32, out: int = 50, columns: int = 70, biased: bool = True
) -> tuple[PackedLinear, nn.Linear]:
    """Return a layer packed and dense."""
    generator = torch.Generator().manual_seed(out)
    dense = nn.Linear(columns, out, bias=biased)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        dense.weight[torch.rand(out, columns, generator=generator) < 0.7] = 0
    dense = dense.to(dtype).requires_grad_(False)
    return PackedLinear(pack(dense.weight.data), dense.bias.data.clone() if biased else None), dense


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def assert_same(result: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (40,), (0,), (2, 3), (2, 1, 20)])
def test_any_leading_shape(multiplier: str, dtype: torch.dtype, biased: bool, shape: tuple[int, ...]) -> None:
    packed, dense = layers(dtype, biased=biased)
    x = inputs(*shape, 70, dtype=dtype)
    result = packed(x)
    assert result.shape == (*shape, 50)
    assert_same(result, dense(x))
    assert torch.equal(packed.to_dense(), dense.weight)


def test_many_vectors_are_multiplied_in_tiles(multiplier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_TILE_BYTES", 7 * 70 * 4)
    for biased in (False, True):
        packed, dense = layers(biased=biased)
        assert_same(packed(inputs(33, 70)), dense(inputs(33, 70)))
        assert torch.equal(packed.to_dense(), dense.weight)


def test_noncontiguous_inputs(multiplier: str) -> None:
    packed, dense = layers()
    for x in (inputs(70, 5).T, inputs(4, 3, 140)[..., ::2], inputs(1, 70).expand(6, 70)):
        assert_same(packed(x), dense(x))


def test_layers_can_be_moved_and_cast(multiplier: str) -> None:
    packed, dense = layers()
    x = inputs(3, 70)
    packed(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        packed, dense = packed.to(dtype), dense.to(dtype)
        assert packed.values.dtype == dtype and packed.mask.dtype == torch.int32
        torch.testing.assert_close(packed(x.to(dtype)), dense(x.to(dtype)), rtol=2e-2, atol=2e-2)


def test_copies_and_replaced_tensors(multiplier: str) -> None:
    packed, dense = layers()
    x = inputs(3, 70)
    expected = packed(x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), expected)
    packed.bias = nn.Parameter(torch.zeros(50), requires_grad=False)
    assert_same(packed(x), F.linear(x, dense.weight))
    packed.values = 2 * packed.values
    assert_same(packed(x), F.linear(x, 2 * dense.weight))
    packed.load_state_dict(layers()[0].state_dict())
    assert torch.equal(packed(x), expected)
    packed.values = packed.values[:-1].clone()
    if multiplier == "kernel":
        with pytest.raises(ValueError):
            packed(x)
    with pytest.raises(ValueError):
        packed.check()


def test_gradients_of_the_input_and_the_bias(multiplier: str) -> None:
    packed, dense = layers()
    x = inputs(12, 70).requires_grad_()
    assert packed.bias is not None
    packed.bias.requires_grad_()
    torch.autograd.backward((packed(x) ** 2).sum())
    other = x.detach().requires_grad_()
    bias = dense.bias.clone().requires_grad_()
    torch.autograd.backward((F.linear(other, dense.weight, bias) ** 2).sum())
    assert x.grad is not None and other.grad is not None
    assert_same(x.grad, other.grad)
    # One of the two gradients alone.
    again = x.detach().requires_grad_()
    packed.bias.requires_grad_(False)
    torch.autograd.backward((packed(again) ** 2).sum())
    assert again.grad is not None
    assert_same(again.grad, other.grad)
    packed.bias.requires_grad_().grad = None
    torch.autograd.backward((packed(x.detach()) ** 2).sum())
    assert packed.bias.grad is not None and bias.grad is not None
    assert_same(packed.bias.grad, bias.grad)


def test_invalid_inputs_raise_as_for_a_dense_layer(multiplier: str) -> None:
    packed, dense = layers()
    for x in (inputs(3, 69), inputs(3, 71), inputs(3, 70).double()):
        for layer in (packed, dense):
            with pytest.raises(RuntimeError):
                layer(x)


def test_autocast_casts_as_for_a_dense_layer(multiplier: str) -> None:
    packed, dense = layers()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = packed(inputs(3, 70)), dense(inputs(3, 70))
    assert result.dtype == expected.dtype == torch.bfloat16
    assert_same(result, expected)


def test_empty_layers(multiplier: str) -> None:
    packed = PackedLinear(pack(torch.zeros(4, 10)))
    assert torch.equal(packed(inputs(3, 10)), torch.zeros(3, 4)) and len(packed.values) == 0
    none = PackedLinear(pack(torch.zeros(0, 10)))
    assert none(inputs(3, 10)).shape == (3, 0) and none.to_dense().shape == (0, 10)
    assert "in_features=10, out_features=4, bias=False, 0.00% kept" in repr(packed)
