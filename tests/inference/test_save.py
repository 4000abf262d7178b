"""Packed models that save themselves: the same shards again, and whatever was changed in memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import alps
from alps.checkpoints.pack import pack_directory
from alps.core.errors import CheckpointError, ConfigError
from helpers.decoders import decoder
from helpers.packed_models import logits, prune
from helpers.packing import contents
from helpers.vision import VISION, vision_model


@pytest.fixture(params=["llama", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    """Kinds whose layers are of different classes."""
    name: str = request.param
    return name


@pytest.fixture
def packed(kind: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """A packed model of each kind; its checkpoint has several weight files."""
    model = tiny_model(kind)
    prune(model)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def test_an_unchanged_model_is_written_as_the_same_shards(packed: Path, tmp_path: Path) -> None:
    model = alps.load(packed).model
    model.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(packed)
    assert contents(tmp_path / "again").keys() - {"generation_config.json"} <= contents(packed).keys()
    alps.unpack(tmp_path / "again", tmp_path / "back")
    assert weights(tmp_path / "back") == weights(tmp_path / "dense") and len(weights(tmp_path / "back")) > 1
    # Over an older one, and over the directory that the model comes from.
    for folder in (tmp_path / "again", packed):
        (folder / "README.md").write_text("mine")
        (folder / "packed-00001-of-00002.safetensors").write_bytes(b"old")
        model.save_pretrained(str(folder), max_shard_size="1GB")
        assert weights(folder).keys() == {"packed.safetensors", "alps.safetensors"}
        assert (folder / "README.md").read_text() == "mine"
        alps.unpack(folder, tmp_path / f"{folder.name}-back")


@pytest.mark.parametrize("kind", ["llama"])
def test_copies_save_themselves(packed: Path, tmp_path: Path) -> None:
    model = alps.load(packed).model
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.model.norm.weight.data.fill_(number)
        other.save_pretrained(tmp_path / str(number))
        assert bool((alps.load(tmp_path / str(number)).model.model.norm.weight == number).all())


def test_what_was_changed_in_memory_is_saved(packed: Path, kind: str, tmp_path: Path, ids: Tensor) -> None:
    model = alps.load(packed, "bfloat16").model
    layer = next(layer for layer in model.modules() if type(layer).__name__ == "PackedLinear")
    layer.weight.mul_(2)  # dense from now on
    model.save_pretrained(tmp_path / "changed", max_shard_size=20_000)
    changed = alps.load(tmp_path / "changed").model
    assert changed.dtype == torch.bfloat16 and len(weights(tmp_path / "changed")) > 2
    torch.testing.assert_close(logits(changed, ids), logits(model, ids), rtol=0.02, atol=0.02)
    alps.unpack(tmp_path / "changed", tmp_path / "back")
    for path in (tmp_path / "back").glob("*.safetensors"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(path).values())


@pytest.mark.parametrize("kind", ["llama"])
def test_a_compressed_directory_is_compressed_again(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    pack_directory(tmp_path / "dense", tmp_path / "compressed", compress=True)
    alps.load(tmp_path / "compressed").model.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "compressed") != weights(packed)


@pytest.mark.parametrize("kind", ["llama"])
def test_what_cannot_be_saved_is_refused(packed: Path, tmp_path: Path) -> None:
    model = alps.load(packed).model
    for name, value in {"state_dict": {}, "push_to_hub": True, "variant": "fp16"}.items():
        with pytest.raises(ConfigError, match=f"does not support {name}: leave it out"):
            model.save_pretrained(tmp_path / "no", **{name: value})
    with pytest.raises(ConfigError, match="max_shard_size is 'big'"):
        model.save_pretrained(tmp_path / "no", max_shard_size="big")
    with pytest.raises(CheckpointError, match="A part of a packed model cannot be saved"):
        model.model.save_pretrained(tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"holds dense weights \(model.safetensors.index.json\): give a new"):
        model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="has 2 tensors that its packed directory lacked, the first is adapter"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("architecture", ["mixtral", pytest.param("llava", marks=pytest.mark.slow)])
def test_tensors_that_were_converted_are_converted_back(architecture: str, tmp_path: Path) -> None:
    model = vision_model(architecture) if architecture in VISION else decoder(architecture)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    auto = AutoModelForImageTextToText if architecture in VISION else AutoModelForCausalLM
    for name, loaded in {
        "alps": alps.load(tmp_path / "packed").model,
        "transformers": auto.from_pretrained(tmp_path / "packed"),
    }.items():
        loaded.save_pretrained(tmp_path / name)
        assert weights(tmp_path / name) == weights(tmp_path / "packed"), name
