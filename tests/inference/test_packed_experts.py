"""Tests of packed experts: they stand in for a fused parameter in every use that transformers makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alps
from alps.checkpoints.pack import pack_directory
from alps.inference.convert import packed_modules
from alps.inference.packed_experts import PackedExperts, replace_experts
from alps.inference.packed_linear import PackedLinear
from alps.models.sites import find_sites
from helpers.decoders import decoder
from helpers.packed_models import logits

EXPERTS, OUT, IN = 5, 12, 40


class Experts(nn.Module):
    """Owner of a fused parameter."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = EXPERTS, is_transposed
        weight = torch.randn(EXPERTS, *((IN, OUT) if is_transposed else (OUT, IN)))
        self.fused: Any = nn.Parameter(torch.where(torch.rand_like(weight) < 0.6, 0.0, weight), requires_grad=False)


@pytest.fixture(params=[False, True], ids=["out-in", "in-out"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Any, list[int]]:
    """Return the dense parameter, its stand-in, and a list that grows with every layer that is unpacked."""
    owner = Experts(request.param)
    dense, unpacked, to_dense = owner.fused.data.clone(), list[int](), PackedLinear.to_dense
    replace_experts(owner, "fused", owner.fused.data)

    def unpack(layer: PackedLinear) -> Tensor:
        unpacked.append(id(layer))
        return to_dense(layer)

    monkeypatch.setattr(PackedLinear, "to_dense", unpack)
    return dense, owner.fused, unpacked


def test_products_with_one_expert_leave_it_packed(pair: tuple[Tensor, Any, list[int]]) -> None:
    dense, packed, unpacked = pair
    assert isinstance(packed, PackedExperts) and len(packed) == EXPERTS
    for x in (torch.randn(dense.shape[1]), torch.randn(3, dense.shape[1])):
        if dense.shape[1] == IN:
            torch.testing.assert_close(x @ packed[3], x @ dense[3])
            torch.testing.assert_close(torch.matmul(x, packed[torch.tensor(3)]), x @ dense[3])
    if dense.shape[1] == OUT:
        x, bias = torch.randn(3, IN), torch.randn(OUT)
        torch.testing.assert_close(F.linear(x, packed[3]), F.linear(x, dense[3]))
        torch.testing.assert_close(F.linear(x, packed[torch.tensor(3)], bias), F.linear(x, dense[3], bias))
    assert unpacked == []


def test_other_uses_give_what_the_dense_parameter_gives(pair: tuple[Tensor, Any, list[int]]) -> None:
    dense, packed, unpacked = pair
    assert packed.shape == dense.shape and packed.dtype == dense.dtype and packed.device == dense.device
    assert packed.size(1) == dense.shape[1] and packed.ndim == 3 and unpacked == []
    assert torch.equal(packed[2] + 0, dense[2]) and torch.equal(packed[2].t() + 0, dense[2].t())
    assert len(unpacked) == 2
    for index in (torch.tensor([3, 1, 3]), torch.tensor([True, False, False, False, True]), slice(1, 3), ...):
        assert torch.equal(packed[index], dense[index]), index
    assert torch.equal(packed.to_dense(), dense) and torch.equal(packed.transpose(1, 2) + 0, dense.transpose(1, 2))
    x = torch.randn(EXPERTS, 3, dense.shape[1])
    unpacked.clear()
    torch.testing.assert_close(torch.bmm(x, packed), torch.bmm(x, dense))
    assert len(unpacked) == (0 if dense.shape[1] == IN else EXPERTS)
    torch.testing.assert_close(torch.einsum("eti,eio->eto", x, packed), torch.bmm(x, dense))
    with pytest.raises(AttributeError):
        _ = packed.no_such_attribute


def zero_half(model: nn.Module) -> None:
    with torch.no_grad():
        for site in find_sites("", model):
            weight = site.read()
            site.write(torch.where(weight.abs() <= weight.abs().median(), 0, weight))


# Stored one by one and stacked, stored fused, and stored fused with the inputs first.
_OTHERS = ("granitemoe", "llama4", "jetmoe", "deepseek_v4")


@pytest.mark.parametrize(
    "kind", ["gpt_oss", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", *_OTHERS))]
)
def test_mixtures_run_with_packed_experts(kind: str, ids: Tensor, tmp_path: Path) -> None:
    model = decoder(kind)
    zero_half(model)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    packed = alps.load(tmp_path / "packed").model
    stand_ins = {name: module for name, module in packed.named_modules() if isinstance(module, PackedExperts)}
    fused = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    assert stand_ins.keys() == {name for name in fused if "conv" not in name} and stand_ins
    assert all(torch.equal(module.to_dense(), fused[name]) for name, module in stand_ins.items())
    expected = logits(model, ids)
    tolerance: Any = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits(packed, ids), expected, **tolerance)
    assert all(layer.is_packed for _, layer in packed_modules(packed))
    # A model in memory is packed to the same layers; transformers may take all experts at once.
    alps.pack_linears(model)
    assert [name for name, _ in packed_modules(model)] == [name for name, _ in packed_modules(packed)]
    assert torch.equal(logits(model, ids), logits(packed, ids))
    if kind == "mixtral" and hasattr(packed, "set_experts_implementation"):
        for implementation in ("grouped_mm", "batched_mm"):
            packed.set_experts_implementation(implementation)
            torch.testing.assert_close(
                logits(packed, ids), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )
