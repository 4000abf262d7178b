"""Packing of a model in memory, and what it must not be saved as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.core.errors import CheckpointError
from alps.inference.convert import pack_linears, packed_modules, tied_parameters
from helpers.packed_models import logits


def test_an_ordinary_directory_loads_dense_and_can_be_packed(
    multiplier: str, packed_stories: tuple[Path, Path], ids: Tensor
) -> None:
    model, packed = alps.load(packed_stories[0]).model, alps.load(packed_stories[1]).model
    assert list(packed_modules(model)) == []
    assert alps.pack_linears(model) == 35
    assert [name for name, _ in packed_modules(model)] == [name for name, _ in packed_modules(packed)]
    assert torch.equal(logits(model, ids), logits(packed, ids))


def test_layers_are_packed_where_it_makes_them_smaller(
    tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    before = logits(model, ids)
    assert pack_linears(model) == 0, "a dense model has nothing to pack"
    c_fc = model.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        c_fc.weight[: 3 * len(c_fc.weight) // 4] = 0
        expected = logits(model, ids)
    assert not torch.equal(before, expected)
    weight, bias = c_fc.weight.detach().clone(), c_fc.bias.detach().clone()
    assert pack_linears(model) == 1
    ((name, layer),) = packed_modules(model)
    assert name == "transformer.h.1.mlp.c_fc" and layer.bias is not None and torch.equal(layer.bias, bias)
    # A Conv1D holds (in, out).
    assert torch.equal(layer.to_dense(), weight.T)
    torch.testing.assert_close(logits(model, ids), expected)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_tied_weights_stay_dense(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    assert tied_parameters(model) == {"transformer.wte.weight", "lm_head.weight"}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert pack_linears(model) == 0 and tied_parameters(tiny_model("llama")) == set()
