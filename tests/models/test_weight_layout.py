"""A model that was loaded whole is laid out as its checkpoint: the same files, names and tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alps.data.loaded_model import load
from alps.models.weight_layout import lay_out_weights
from helpers.decoders import decoder


def _values(layout: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: {t.name: t.read() for t in tensors} for file, tensors in layout.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "olmo_hybrid", "deepseek_v4"])
def test_every_file_gets_its_tensors_back(kind: str, tmp_path: Path) -> None:
    model = decoder(kind)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    layout = lay_out_weights(load(str(tmp_path)).model, tmp_path)
    assert layout is not None and len(layout) > 1
    for name, tensors in _values(layout).items():
        stored = load_file(tmp_path / name)
        assert tensors.keys() == stored.keys()
        assert all(torch.equal(tensors[key], value) for key, value in stored.items())


def test_changed_weights_go_where_they_were_and_others_are_kept(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {"model.layers.3.mtp.weight": torch.ones(2, 3)}
    # Names without the prefix of the base model, and a tensor of a part that the class does not build.
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()} | extra
    save_file(stored, path, {"format": "pt"})
    model = load(str(tmp_path)).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    layout = lay_out_weights(model, tmp_path)
    assert layout is not None
    (tensors,) = _values(layout).values()
    assert tensors.keys() == stored.keys()
    changed = [name for name in stored if not torch.equal(tensors[name], stored[name])]
    assert changed == ["layers.1.mlp.up_proj.weight"] and not tensors[changed[0]].any()


def test_a_model_without_a_place_for_a_tensor_has_no_layout(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    assert lay_out_weights(tiny_model("llama"), tmp_path) is None
    tiny_model("llama").save_pretrained(tmp_path)
    assert lay_out_weights(tiny_model("gpt2"), tmp_path) is None
