"""A head beside a configuration that says it is the embedding: one reading, whole, streamed and packed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alps.checkpoints.pack import pack_directory
from alps.data.loaded_model import load, open_model
from alps.models.lazy_weights import LazyWeights
from helpers.command_line import run_alps

IDS = torch.arange(3, 67)[None]
HEADS = ["none", "equal", "other"]


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, stories: Path, tmp_path: Path) -> Path:
    """The checkpoint says "tied", and holds the head that the parameter names."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in stories.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    embedding = tensors["model.embed_tokens.weight"]
    if request.param != "none":
        tensors["lm_head.weight"] = embedding.flip(0) if request.param == "other" else embedding.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_every_way_of_loading_reads_the_head_of_transformers(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    other = request.node.callspec.params["checkpoint"] == "other"
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert (expected.lm_head.weight is not expected.model.embed_tokens.weight) == other
    pack_directory(checkpoint, tmp_path / "packed")
    for way, path in (("load", checkpoint), ("load", tmp_path / "packed"), ("open", checkpoint)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "alps"):
            loaded = load(str(path)) if way == "load" else open_model(str(path))
        assert len(caplog.messages) == other and all("holds a head with other values" in m for m in caplog.messages)
        model: Any = loaded.model
        assert model.config.tie_word_embeddings is not other
        if loaded.store is not None:
            assert isinstance(loaded.store, LazyWeights)
            with loaded.store.non_block_weights():
                head = model.lm_head.weight.detach().clone()
        else:
            torch.testing.assert_close(_logits(model), _logits(expected), rtol=0, atol=1e-5)
            head = model.lm_head.weight
        assert torch.equal(head, expected.lm_head.weight), (way, path)


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_a_pruned_checkpoint_keeps_the_head(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    other = request.node.callspec.params["checkpoint"] == "other"
    arguments = ["--sparsity", 0.5, "--method", "magnitude", "--no-measure-error"]
    assert run_alps(monkeypatch, "prune", checkpoint, tmp_path / "out", *arguments) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint, tmp_path / "out"))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not other
