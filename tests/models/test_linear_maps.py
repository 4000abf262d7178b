"""Subclasses of linear layers are compared with the product of their inputs and their weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from alps.models.linear_maps import ProductCheck, is_linear_layer
from alps.models.sites import find_sites


class _Written(nn.Linear):
    """Product spelled in another way, as Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class _Grouped(nn.Linear):
    """Block-diagonal product, as DeepSeek V4's: every group of rows reads inputs of its own."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.groups, -1, x.shape[-1]).transpose(1, 2)
        rows = x.reshape(-1, self.groups, x.shape[-1]).transpose(0, 1)
        return torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-2], self.groups, -1)


class _Ternary(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        return nn.functional.linear(input, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class _Scaled(nn.Linear):
    """Product times a buffer, which is 1 or 2."""

    def __init__(self, scale: float) -> None:
        super().__init__(4, 6)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.get_buffer("scale")


class _Pair(nn.Linear):
    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input + other)


class _Turned(Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weight + self.bias
        return product


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(4, 6), True),
        (Conv1D(6, 4), True),
        (_Written(4, 6), True),
        (_Turned(6, 4), True),
        (_Grouped(4, 6, 2), False),
        (_Ternary(4, 6), False),
        (_Pair(4, 6), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_compared_with_its_product(module: nn.Module, expected: bool, device: str) -> None:
    module = copy.deepcopy(module).to(device)
    before = [parameter.clone() for parameter in module.parameters()]
    state = torch.random.get_rng_state()
    assert ProductCheck()(module) is expected
    assert torch.equal(state, torch.random.get_rng_state())
    if device == "cpu":
        assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_equal_modules_are_checked_once_and_settings_tell_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = _Grouped.forward

    def counted(self: _Grouped, x: Tensor) -> Tensor:
        calls.append(self.groups)
        return forward(self, x)

    monkeypatch.setattr(_Grouped, "forward", counted)
    check = ProductCheck()
    assert not check(_Grouped(4, 6, 2)) and not check(_Grouped(4, 6, 2)) and calls == [2]
    assert not check(_Grouped(4, 6, 3)) and calls == [2, 3]


def test_buffers_count_and_modules_that_hold_them_are_checked_one_by_one() -> None:
    check = ProductCheck()
    same, double = _Scaled(1.0), _Scaled(2.0)
    assert check(same) and not check(double)


def test_a_computed_weight_is_no_site() -> None:
    """The parameters of a parametrised layer are others than its weight."""
    block = nn.ModuleDict({"plain": nn.Linear(4, 4), "normed": parametrizations.weight_norm(nn.Linear(4, 4))})
    assert not is_linear_layer(block["normed"])
    assert [site.name for site in find_sites("layer", block)] == ["layer.plain"]
