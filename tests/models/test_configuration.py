"""Configurations that ask for tuples or for more outputs: the same figures as without, for every way to read them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig

import alps
from alps.core.errors import UnsupportedModel
from alps.inference.text_generation import generate_text
from alps.models.configuration import load_config, reset_outputs

_DENSE_FORMAT = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
_CHANGES: list[dict[str, Any]] = [
    {},
    {"return_dict": False},
    {"torchscript": True},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"output_router_logits": True},
    {"use_cache": False},
    {"quantization_config": _DENSE_FORMAT},
]


@pytest.fixture(scope="module")
def plain_figures(short_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Return the figures of an unchanged configuration."""
    return _figures(short_stories, tmp_path_factory.mktemp("plain"))


def _figures(model: Path, folder: Path) -> Mapping[str, Any]:
    """Prune, pack, evaluate, generate and compare."""
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 60)
    small: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 32}
    measured: dict[str, Any] = {"seqlen": 32, "windows": 4}
    alps.prune(model, sparsity=0.5, method="wanda", out=folder / "out", **small)
    alps.pack(folder / "out", folder / "packed")
    results = alps.compare(
        model, folder / "all", methods=["magnitude"], sparsity=[0.5], texts=[text], eval_seqlen=32, windows=4, **small
    )
    loaded = alps.load(model)
    return {
        "weights": hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest(),
        "dense": alps.evaluate(model, text, **measured)[0].loss,
        "pruned": alps.evaluate(folder / "out", text, **measured)[0].loss,
        "packed": alps.evaluate(folder / "packed", text, **measured)[0].loss,
        "compared": [result.evaluations[0].loss for result in results],
        "text": generate_text(loaded.model, loaded.tokenizer, "Once", 8).text,
    }


@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: "".join(change) or "none")
def test_outputs_that_a_configuration_asks_for_change_no_figure(
    change: dict[str, Any], plain_figures: Mapping[str, Any], short_stories: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(short_stories, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert _figures(model, tmp_path) == plain_figures


def test_settings_of_parts_are_reset_as_well() -> None:
    config = LlavaConfig(text_config=LlamaConfig(output_hidden_states=True), output_hidden_states=True)
    config.text_config.return_dict = False
    reset_outputs(config)
    assert not config.output_hidden_states and not config.text_config.output_hidden_states
    assert config.text_config.return_dict


def test_nothing_else_of_a_configuration_is_changed(short_stories: Path) -> None:
    read, plain = load_config(str(short_stories)), LlamaConfig.from_pretrained(short_stories)
    assert {**read.to_dict(), "_name_or_path": ""} == plain.to_dict()


def test_a_model_in_memory_that_returns_tuples_is_refused(short_stories: Path) -> None:
    loaded = alps.load(short_stories)
    loaded.model.config.return_dict = False
    with pytest.raises(UnsupportedModel, match="returns tuples"):
        alps.evaluate(loaded, "text")
