"""Opening without weights: what is on the meta device, and why a checkpoint has to be loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alps.data.loaded_model import LoadedModel, open_model
from alps.models.lazy_weights import LazyWeights
from alps.models.meta_model import open_lazy_model
from helpers.log_messages import log_messages


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensors: {f"odd.{name}": t for name, t in tensors.items()}, "under another name"),
        (lambda tensors: {name: t.to(torch.int8) for name, t in tensors.items()}, "integers"),
    ],
)
def test_what_cannot_be_streamed_is_loaded_whole_and_said(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reason: str,
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    save_file(spoil(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    whole = LoadedModel("whole", nn.Linear(2, 2), None)
    monkeypatch.setattr("alps.data.loaded_model.load", lambda name, dtype: whole)
    with log_messages() as messages:
        assert open_model(str(tmp_path), "auto") is whole
    assert len(messages) == 1 and reason in messages[0]


def test_a_model_without_a_skeleton_is_loaded_whole_and_told_why(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> nn.Module:
        raise ValueError("no such layer.\nAnd more.")

    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("alps.models.meta_model.empty_model", fail)
    assert open_lazy_model(str(tmp_path), None) == "transformers cannot build it without its weights (no such layer)"


@pytest.mark.parametrize("kind", ["gpt2", "opt-postnorm"])
def test_parameters_are_on_the_meta_device_and_buffers_have_their_values(
    kind: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = tiny_model(kind, torch.bfloat16)
    dense.save_pretrained(tmp_path)
    store = open_lazy_model(str(tmp_path), None)
    assert isinstance(store, LazyWeights) and not store.model.training
    assert type(store.model) is type(dense)
    parameters, expected = dict(store.model.named_parameters()), dict(dense.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.is_meta and parameter.shape == expected[name].shape and parameter.dtype == torch.bfloat16
    for name, buffer in store.model.named_buffers():
        assert torch.equal(buffer, dense.get_buffer(name)), name


def test_a_directory_without_safetensors_is_loaded_whole(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert open_lazy_model(str(tmp_path), None) == "it has no safetensors files"
