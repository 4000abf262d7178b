"""Files of an output: written before the first block, with room for all that follows, and mended between two runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import alps
from alps.checkpoints.journal import Journal
from alps.core.errors import CheckpointError, ConfigError, SolveFailed
from alps.finetuning.api import distill
from helpers.model_comparison import same_models, tree

_OWN = {"README.md", "report.json", "report.html", "alps.yaml"}


@pytest.fixture
def arguments(english_file: Path) -> dict[str, Any]:
    return {"method": "wanda", "calibration": english_file, "samples": 4, "seqlen": 32}


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _add_files(folder: Path) -> None:
    """Add what a checkpoint may hold: files in odd forms, licences, templates and code that no one may run."""
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    (folder / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "NOTICE", "chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.model"):
        (folder / name).write_bytes(name.encode() + (b"\r\n" if name.endswith("jinja") else b"\x00\xff\r\n"))
    (folder / "modeling_own.py").write_text("raise SystemExit(3)\n")


@contextmanager
def _stopped_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Context in which runs fail when they have kept so many blocks."""
    save = Journal.save_tensors

    def fail(self: Journal, index: int, tensors: Any) -> None:
        if index == blocks:
            raise SolveFailed("Stopped.")
        save(self, index, tensors)

    with monkeypatch.context() as patch, pytest.raises(SolveFailed, match="Stopped"):
        patch.setattr(Journal, "save_tensors", fail)
        yield


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_sparsity_of_zero_gives_the_files_of_the_input(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path, whole: bool, shards: bool, monkeypatch: Any
) -> None:
    if shards:
        alps.load(checkpoint).model.save_pretrained(checkpoint, max_shard_size="30KB")
        (checkpoint / "model.safetensors").unlink()
    _add_files(checkpoint)
    if whole:
        monkeypatch.setattr("alps.data.loaded_model.open_lazy_model", lambda *_: "a test has it so")
    alps.prune(checkpoint, sparsity=0.0, out=tmp_path / "out", **arguments)
    names = {name for name in tree(checkpoint) if (checkpoint / name).is_file()}
    assert {name for name in tree(tmp_path / "out") if (tmp_path / "out" / name).is_file()} == names | _OWN
    different = [name for name in names if (tmp_path / "out" / name).read_bytes() != (checkpoint / name).read_bytes()]
    assert different == []


def test_a_conversion_changes_the_dtype_and_the_size_alone(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    alps.load(checkpoint).model.save_pretrained(checkpoint, max_shard_size="30KB")
    (checkpoint / "model.safetensors").unlink()
    config = (checkpoint / "config.json").read_text().replace('"dtype"', '"torch_dtype"')
    (checkpoint / "config.json").write_text(config)
    out = tmp_path / "out"
    alps.prune(checkpoint, sparsity=0.5, dtype="bfloat16", out=out, **arguments)
    expected = config.replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"')
    assert expected != config and (out / "config.json").read_text() == expected
    index, before = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (out, checkpoint))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"] == {**before["metadata"], "total_size": before["metadata"]["total_size"] // 2}
    assert alps.load(out).model.dtype == torch.bfloat16


def test_pickled_weights_become_safetensors_among_the_same_files(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    _add_files(checkpoint)
    alps.prune(checkpoint, sparsity=0.0, out=tmp_path / "out", **arguments)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)
    for name in set(tree(checkpoint)) - {"pytorch_model.bin", "additional_chat_templates"}:
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes(), name


def test_distillation_keeps_the_files_of_the_pruned_directory(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    alps.prune(checkpoint, sparsity=0.5, out=pruned, **arguments)
    _add_files(pruned)
    distill(checkpoint, pruned, out, steps=1, calibration=arguments["calibration"], samples=4, seqlen=16)
    for name in set(tree(pruned)) - _OWN - {"model.safetensors", "additional_chat_templates"}:
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    assert not (out / "alps.yaml").exists()
    assert (out / "model.safetensors").stat().st_size == (pruned / "model.safetensors").stat().st_size


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_continues_when_its_side_files_were_mended(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if whole:
        monkeypatch.setattr("alps.data.loaded_model.open_lazy_model", lambda *_: "a test has it so")
    alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "plain", **arguments)
    _edit(checkpoint / "config.json", output_hidden_states=True, pad_token_id=7, architectures=["Odd"], use_cache=False)
    out = tmp_path / "out"
    with _stopped_after(2, monkeypatch):
        alps.prune(checkpoint, sparsity=0.5, out=out, **arguments)
    assert tree(tmp_path / "out.partial").count("block-00001.json") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "plain"]
    # As a killed process leaves it.
    (tmp_path / "out.partial" / "files").mkdir()
    (tmp_path / "out.partial" / "files" / "merges.txt").write_text("stale")
    _edit(checkpoint / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match="model_sha256"):
        alps.prune(checkpoint, sparsity=0.5, out=out, resume=True, **arguments)
    _edit(
        checkpoint / "config.json",
        rms_norm_eps=json.loads((tmp_path / "plain" / "config.json").read_text())["rms_norm_eps"],
        output_hidden_states=False,
        pad_token_id=None,
        eos_token_id=[1, 2],
        architectures=["LlamaForCausalLM"],
    )
    _edit(checkpoint / "tokenizer_config.json", model_max_length=128)
    _edit(checkpoint / "generation_config.json", temperature=0.5, do_sample=True)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    alps.prune(checkpoint, sparsity=0.5, out=out, resume=True, **arguments)
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    for name in set(tree(checkpoint)) - {weights}:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_attentions_in_the_output_do_not_end_a_run(checkpoint: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "plain", **arguments)
    _edit(checkpoint / "config.json", output_attentions=True)
    alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "out", **arguments)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_attentions"] is True
    plain, out = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in out.items())


@pytest.mark.parametrize("part", ["configuration", "generation settings", "tokenizer"])
def test_what_transformers_cannot_save_is_told_before_a_model_in_memory_is_pruned(
    tiny_model: Callable[..., Any], word_tokenizer: Any, ids: Tensor, tmp_path: Path, part: str, monkeypatch: Any
) -> None:
    model = tiny_model("llama")
    if part == "configuration":
        model.config._output_attentions = True
    elif part == "generation settings":
        model.generation_config.temperature, model.generation_config.do_sample = -1.0, False
        model.generation_config.max_new_tokens = -5
    else:
        monkeypatch.setattr(type(word_tokenizer), "save_pretrained", Mock(side_effect=KeyError("absent")))
    with pytest.raises(ConfigError, match=f"The model's {part} cannot be saved .*, so that nothing is pruned"):
        alps.prune(model, sparsity=0.5, method="wanda", calibration=ids, tokenizer=word_tokenizer, out=tmp_path / "out")
    assert tree(tmp_path) == [] and same_models(model, tiny_model("llama"))


def _needed(checkpoint: Path) -> int:
    """Return the bytes of all tensors, and of those of the blocks once more, which the journal keeps."""
    tensors = load_file(checkpoint / "model.safetensors")
    return sum(t.nbytes * (2 if "layers" in name else 1) for name, t in tensors.items())


def test_a_disk_without_room_is_told_before_the_first_block(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed, free = _needed(checkpoint), SimpleNamespace(total=2**40, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    for free.free in (0, needed - 1):
        with pytest.raises(CheckpointError, match=r"Output directory '.*out' needs 0 MiB, and its disk has 0 MiB left"):
            alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "out", **arguments)
        assert tree(tmp_path) == []
    free.free = needed
    alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "out", **arguments)
    free.total = free.free = 0
    alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "other", **arguments)


@pytest.mark.parametrize("text", ["not JSON", '{"max_new_tokens": -4}'])
def test_generation_settings_that_no_one_can_read_are_told_before_the_first_block(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path, text: str
) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json' cannot be used \(.*: correct or remove it"):
        alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "out", **arguments)
    assert tree(tmp_path) == []


def test_a_file_that_cannot_be_copied_is_told_before_the_first_block(
    checkpoint: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    (checkpoint / "vocab.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"vocab\.txt' is a symbolic link to no file"):
        alps.prune(checkpoint, sparsity=0.5, out=tmp_path / "out", **arguments)
    assert tree(tmp_path) == []
