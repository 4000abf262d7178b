"""Tests of what packing says of tensors that will be dense in memory, and that loading does as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import alps
from alps.checkpoints.manifest import read_manifest
from alps.cli.tables import pack_summary
from alps.inference.convert import packed_modules
from alps.inference.dense_in_memory import find_dense_in_memory
from alps.inference.packing_plan import READ_BY_CODE
from helpers.decoders import DENSE, HYBRID, IMAGES, MOE, RECENT, STRUCTURED, decoder
from helpers.packed_architectures import packed_result
from helpers.packed_models import logits, prune
from helpers.vision import VISION


def test_layers_whose_weight_is_read_are_dense_and_said_at_packing(tmp_path: Path, ids: Tensor) -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=32, expand=1
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    manifest = alps.pack(tmp_path / "dense", tmp_path / "packed")
    read = [f"backbone.layers.{block}.mixer.dt_proj.weight" for block in range(2)]
    assert {name for name, reason in manifest.dense_in_memory.items() if reason == READ_BY_CODE} == set(read)
    assert manifest == read_manifest(tmp_path / "packed")
    sentence = next(line for line in str(pack_summary(manifest, tmp_path)).splitlines() if "Dense in memory" in line)
    assert f"8,192 bytes of {read[0]} and 1 more, because the model's code reads the weight" in sentence
    packed = alps.load(tmp_path / "packed").model
    before = [name for name, _ in packed_modules(packed)]
    assert len(before) == 6 and isinstance(packed.get_submodule("backbone.layers.0.mixer.dt_proj"), torch.nn.Linear)
    torch.testing.assert_close(logits(packed, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in packed_modules(packed)] == before


def test_nothing_is_said_of_what_stays_packed(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert find_dense_in_memory(tmp_path) == {"model.embed_tokens.weight": "Embedding is no linear layer"}
    manifest = alps.pack(tmp_path, tmp_path / "packed")
    assert manifest.dense_in_memory == {} and "memory" not in str(pack_summary(manifest, tmp_path))


def test_what_cannot_be_loaded_is_packed_with_a_warning(
    tiny_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    prune(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.up" not in name}
    model.save_pretrained(tmp_path / "dense", state_dict=dict(state))
    manifest = alps.pack(tmp_path / "dense", tmp_path / "packed")
    assert manifest.tensors.keys() == state.keys() and manifest.dense_in_memory == {}
    (message,) = caplog.messages
    assert message.startswith("What is packed cannot be loaded packed, only unpacked: ")
    assert "lacks 1 tensors" in message


_QUICK = ("gpt_neox",)
_KINDS = (*DENSE, *MOE, *HYBRID, *RECENT, *STRUCTURED, *IMAGES, *VISION)


@pytest.mark.parametrize(
    "kind", [*_QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in _KINDS if kind not in _QUICK)]
)
def test_every_architecture_runs_packed(kind: str, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "reference" / "models.md").read_text()
    rows = (line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| "))
    cells = {row[0].strip(): row[-1].strip() for row in rows}
    assert packed_result(kind, tmp_path) == cells.get(kind, "all")


def test_subclasses_of_linear_layers_stay_packed(tmp_path: Path) -> None:
    decoder("falcon").save_pretrained(tmp_path)
    assert set(find_dense_in_memory(tmp_path).values()) == {"it is tied to another weight"}
