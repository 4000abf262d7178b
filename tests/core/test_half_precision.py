"""Products of halves by float32: the exact ones rounded once, in every way that torch asks for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alps.checkpoints.bitmask_codec import pack
from alps.core import half_precision as halves
from alps.core.half_precision import Float32MatmulMode, half_matmul_in_float32, multiplies_by_float32
from alps.inference import packed_linear as linear

_HALVES = [torch.bfloat16, torch.float16]


def _numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _products(dtype: torch.dtype) -> list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name, the product as a model asks for it, the exact one in float64."""
    x, w, b = _numbers(70, 300, dtype=dtype), _numbers(90, 300, dtype=dtype), _numbers(90, dtype=dtype)
    several, others = _numbers(3, 70, 300, dtype=dtype), _numbers(3, 300, 90, dtype=dtype)
    added = _numbers(3, 70, 90, dtype=dtype)
    X, W, B, S, T, A = (item.double() for item in (x, w, b, several, others, added))
    return [
        ("linear", lambda: F.linear(x, w), lambda: X @ W.T),
        ("linear with bias", lambda: F.linear(x, w, b), lambda: X @ W.T + B),
        ("linear of three dimensions", lambda: F.linear(several, w, b), lambda: S @ W.T + B),
        ("matmul", lambda: several @ others, lambda: S @ T),
        ("matmul, one for all", lambda: several @ w.T, lambda: S @ W.T),
        ("addmm", lambda: torch.addmm(b, x, w.T, beta=0.5, alpha=2.0), lambda: 0.5 * B + 2 * X @ W.T),
        ("baddbmm", lambda: torch.baddbmm(added, several, others, beta=2.0, alpha=0.5), lambda: 2 * A + S @ T / 2),
        ("baddbmm of nothing", lambda: torch.baddbmm(added, several, others, beta=0.0), lambda: S @ T),
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", _HALVES)
def test_products_are_those_of_float64_rounded_once(
    dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles much smaller than the matrices, none of whose sides they divide.
    monkeypatch.setattr(halves, "_CHUNK_ENTRIES", 300 * 32)
    for name, product, exact in _products(dtype):
        with mode(), Float32MatmulMode():
            result = product()
        assert result.dtype == dtype, name
        expected = exact()
        # Sums of 300 terms in float32 err far less than the rounding of the answer: half a unit of its last place.
        half = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-4
        assert bool(((result.double() - expected).abs() <= half * 1.01).all()), name


def test_it_is_used_whether_or_not_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        calls.append((*left.shape, right.shape[1]))
        return (left.float() @ right.float()).to(left.dtype)

    monkeypatch.setitem(halves._UPCAST, torch.ops.aten.mm.default, counted)
    layer = nn.Linear(96, 64, bias=False).bfloat16()
    x = _numbers(128, 96, dtype=torch.bfloat16).requires_grad_()
    with Float32MatmulMode():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                layer(x.detach())
        assert calls == [(128, 96, 64)] * 2
        layer(x).sum().backward()
    # Forward, then the gradients of the weight and of the input.
    assert sorted(calls[2:]) == sorted([(128, 96, 64), (64, 128, 96), (128, 64, 96)])


def test_gradients_are_those_of_float32() -> None:
    dtype = torch.bfloat16
    x, w = _numbers(80, 200, dtype=dtype), _numbers(60, 200, dtype=dtype)
    grads = []
    for wide in (False, True):
        own = [item.float().requires_grad_() if wide else item.clone().requires_grad_() for item in (x, w)]
        with Float32MatmulMode():
            F.linear(*own).pow(2).mean().backward()  # type: ignore[no-untyped-call]
        grads.append([item.grad.float() for item in own if item.grad is not None])
        assert len(grads[-1]) == 2
    for half, full in zip(*grads, strict=True):
        assert float((half - full).norm() / full.norm()) < 0.01


def _attended(dtype: torch.dtype, how: str) -> list[Tensor]:
    """Attention of two windows over four heads, and the gradients of its queries, keys and values; in float64."""
    shapes = [(2, 4, 48, 16), (2, 2 if how == "grouped" else 4, 48, 16), (2, 2 if how == "grouped" else 4, 48, 16)]
    parts = [(_numbers(*shape, i, dtype=torch.bfloat16)[..., 0]).to(dtype) for i, shape in enumerate(shapes, start=2)]
    query, key, value = (part.contiguous().requires_grad_() for part in parts)
    settings: dict[str, Any] = {}
    if how == "masked":
        # Every token sees itself, so that no row is empty.
        mask = _numbers(48, 48, dtype=dtype).masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
        settings["attn_mask"] = mask
    elif how == "grouped":
        settings |= {"enable_gqa": True, "is_causal": True}
    else:
        settings["is_causal"] = how == "causal"
    out = F.scaled_dot_product_attention(query, key, value, **settings)
    out.backward(_numbers(2, 4, 48, 16, dtype=torch.bfloat16).to(dtype))  # type: ignore[no-untyped-call]
    grads = [item.grad for item in (query, key, value)]
    return [out.detach().double(), *(item.double() for item in grads if item is not None)]


@pytest.mark.parametrize("how", ["causal", "whole", "masked", "grouped"])
@pytest.mark.parametrize("dtype", _HALVES)
def test_attention_and_its_gradients_go_by_float32(
    dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, torch.dtype]] = []
    real = halves._attention

    def counted(func: Any, *more: Any) -> tuple[Tensor, ...]:
        calls.append((func is halves._ATTENTION_FORWARD, more[0][0].dtype))
        return real(func, *more)

    monkeypatch.setattr(halves, "_attention", counted)
    with Float32MatmulMode():
        result = _attended(dtype, how)
    assert calls == [(True, dtype)] * (dtype is torch.float16) + [(False, dtype)]
    exact, own = _attended(torch.float64, how), _attended(dtype, how)
    for ours, torchs, expected in zip(result, own, exact, strict=True):
        error, theirs = (float((item - expected).norm() / expected.norm()) for item in (ours, torchs))
        assert error < 2 * torch.finfo(dtype).eps
        assert error <= theirs * 1.05


def test_a_torch_without_these_internals_is_left_its_own_way() -> None:
    assert halves._private_op("_scaled_dot_product_of_tomorrow") is None


def test_small_products_and_other_dtypes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Tensor) -> Tensor:
        raise AssertionError

    for name in list(halves._UPCAST):
        monkeypatch.setitem(halves._UPCAST, name, never)
    half, full = torch.bfloat16, torch.float32
    for rows, terms, columns, dtype in ((1, 512, 512, half), (100, 512, 512, full), (100, 0, 50, half)):
        factors = _numbers(rows, terms, dtype=dtype), _numbers(columns, terms, dtype=dtype)
        own = F.linear(*factors)
        with Float32MatmulMode(), torch.inference_mode():
            result = F.linear(*factors)
        assert result.dtype == dtype and torch.equal(result, own), (rows, terms, dtype)


def test_only_halves_on_a_slow_cpu_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for slow in (True, False):
        monkeypatch.setattr(halves, "_FAST", dict.fromkeys(_HALVES, lambda _, slow=slow: not slow))
        for dtype in _HALVES:
            assert multiplies_by_float32(dtype, cpu) is slow
            assert not multiplies_by_float32(dtype, gpu)
        assert not multiplies_by_float32(torch.float32, cpu)
        seen: list[bool] = []
        monkeypatch.setitem(
            halves._UPCAST,
            torch.ops.aten.mm.default,
            lambda a, b, seen=seen: (seen.append(True), a.new_empty(len(a), b.shape[1]))[1],
        )
        layer = nn.Linear(128, 128, bias=False).bfloat16()
        with half_matmul_in_float32(cpu, nn.LayerNorm(8), layer), torch.inference_mode():
            layer(_numbers(128, 128, dtype=torch.bfloat16))
        assert len(seen) == slow


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_layers_multiply_many_vectors_by_float32(
    slow: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "_FAST", {torch.bfloat16: lambda _: not slow})
    # Rows of several tiles, the last of them smaller.
    monkeypatch.setattr(linear, "_TILE_BYTES", 2 * 256 * 24)
    w = _numbers(100, 256, dtype=torch.bfloat16)
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    x, bias = _numbers(3, 20, 256, dtype=torch.bfloat16), _numbers(100, dtype=torch.bfloat16) if biased else None
    with torch.inference_mode():
        result = linear.PackedLinear(pack(w), bias)(x)
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    half = exact.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-4
    assert result.shape == (3, 20, 100)
    assert bool(((result.double() - exact).abs() <= half * 1.01).all())
