"""Tests of the conversion to semi-structured tensors that run without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

import alps
from alps.checkpoints.bitmask_codec import pack
from alps.checkpoints.pack import pack_directory
from alps.core.errors import ConfigError
from alps.data import loaded_model
from alps.inference.packed_linear import PackedLinear
from alps.inference.semi_structured import (
    SemiStructuredLinear,
    check_device,
    convert_to_semi_structured,
    has_2_of_4,
    is_2_4_compatible,
)


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight = torch.randn(rows, columns // 4, 4, generator=generator).masked_fill(order < 2, 0)
    return weight.view(rows, columns).to(dtype)


@pytest.mark.parametrize("columns", [4, 30, 32, 64, 100])
def test_the_pattern_is_detected_in_the_mask(columns: int) -> None:
    """Test each of the 16 patterns of 4 columns, at every position of a row, against a count."""
    for pattern in range(16):
        for place in range(0, columns, 4):
            weight = torch.zeros(2, columns)
            for bit in range(4):
                if pattern >> bit & 1 and place + bit < columns:
                    weight[1, place + bit] = 1
            padded = nn.functional.pad(weight, (0, -columns % 4))
            expected = bool((padded.view(2, -1, 4).sum(-1) <= 2).all())
            assert has_2_of_4(pack(weight).mask) == expected
    # Three neighbours in two adjacent groups, neither of which has more than two.
    assert has_2_of_4(pack(torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0]])).mask)


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (two_of_four(32, 64), True),
        (two_of_four(96, 128, torch.float16), True),
        (two_of_four(32, 64, torch.float32), False),
        (two_of_four(48, 64), False),
        (two_of_four(32, 96), False),
        (torch.ones(32, 64, dtype=torch.bfloat16), False),
        (torch.zeros(0, 64, dtype=torch.bfloat16), False),
    ],
)
def test_compatible_layers_are_detected(weight: Tensor, wanted: bool) -> None:
    assert is_2_4_compatible(PackedLinear(pack(weight))) == wanted


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch compress on the CPU by removing its device check, and silence its prototype warning."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_PROTOTYPE_WARNING_SHOWN", True)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda _: None)
    SparseSemiStructuredTensor._load_dispatch_table()


def test_converted_layers_have_the_packed_weights(anywhere: None) -> None:
    weight, bias = two_of_four(64, 128), torch.randn(64).bfloat16()
    weight[:, :8] = 0
    made = SemiStructuredLinear(PackedLinear(pack(weight), bias))
    held: Any = made.weight
    assert held.__class__.__name__ == "SparseSemiStructuredTensorCUTLASS" and not held.requires_grad
    assert torch.equal(held.to_dense(), weight) and torch.equal(made.get_parameter("bias"), bias)
    assert held.packed.nbytes + held.meta.nbytes == 0.5625 * weight.nbytes


def test_incompatible_layers_stay_packed(anywhere: None) -> None:
    model = nn.Sequential(*(PackedLinear(pack(weight)) for weight in (two_of_four(32, 64), two_of_four(48, 64))))
    assert convert_to_semi_structured(model) == 1
    assert [type(layer) for layer in model] == [SemiStructuredLinear, PackedLinear]
    with pytest.raises(ConfigError, match="prune with --pattern 2:4"):
        convert_to_semi_structured(model)


def test_load_converts_compatible_layers(
    anywhere: None, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_model, "check_device", lambda device: None)
    model = alps.load(stories).model
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.shape[1] == 64:
            parameter.data = two_of_four(len(parameter), 64, torch.float32)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    loaded = alps.load(tmp_path / "packed", dtype="bfloat16", semi_structured=True).model
    kinds = {name: type(layer) for name, layer in loaded.named_modules() if name.endswith("_proj")}
    assert kinds["model.layers.0.self_attn.q_proj"] is SemiStructuredLinear
    assert kinds["model.layers.0.mlp.gate_proj"] is not SemiStructuredLinear  # 172 rows
    with pytest.raises(ConfigError, match="No layer is 2:4"):
        alps.load(tmp_path / "packed", semi_structured=True)  # float32
    with pytest.raises(ConfigError, match="is not packed"):
        alps.load(tmp_path / "dense", semi_structured=True)


def test_devices_without_sparse_tensor_cores_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'cpu' is not: leave semi_structured out"):
        alps.load("nowhere", semi_structured=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"8\.0 or newer"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_device(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 8, 50])
def test_products_on_a_gpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseSemiStructuredTensor, "_PROTOTYPE_WARNING_SHOWN", True)
    SparseSemiStructuredTensor._load_dispatch_table()
    weight = two_of_four(128, 256)
    layer = SemiStructuredLinear(PackedLinear(pack(weight), torch.ones(128).bfloat16()).cuda())
    x = torch.randn(2, tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ weight.double().T + 1
    torch.testing.assert_close(layer(x.cuda()).cpu().double(), expected, rtol=1e-2, atol=1e-1)


def test_inputs_are_made_contiguous(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that inputs are made contiguous, which torch's semi-structured tensors require."""
    layer = SemiStructuredLinear(PackedLinear(pack(two_of_four(32, 64)), torch.zeros(32).bfloat16()))
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(functional, "linear", lambda *given: asked.append(given))
    layer(torch.zeros(64, 3, dtype=torch.bfloat16).T)
    (x, weight, bias) = asked[0]
    assert x.is_contiguous() and x.shape == (3, 64) and weight is layer.weight and bias is layer.bias
