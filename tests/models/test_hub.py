"""A model given by its hub name is streamed from the cache of downloads, here laid out as the hub's client does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.command_line import run_alps

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FLAGS = ("--sparsity", "0.5", "--method", "magnitude", "--no-measure-error")


def _cache(model: Path, root: Path, shards: bool) -> Path:
    """The cache with one downloaded model, `owner/tiny`; returns its snapshot."""
    repo = root / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(_COMMIT)
    snapshot = repo / "snapshots" / _COMMIT
    shutil.copytree(model, snapshot)
    if shards:
        (snapshot / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(snapshot, max_shard_size="200KB")
    return snapshot


@pytest.mark.parametrize("shards", [False, True])
def test_it_is_pruned_as_from_its_directory_and_not_loaded_whole(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short_stories: Path,
    tmp_path: Path,
    shards: bool,
) -> None:
    snapshot = _cache(short_stories, tmp_path / "cache", shards)
    assert (snapshot / "model.safetensors.index.json").is_file() == shards
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run_alps(monkeypatch, "prune", "owner/tiny", tmp_path / "named", *_FLAGS) == 0
    assert "in memory whole" not in capsys.readouterr().err
    assert run_alps(monkeypatch, "prune", snapshot, tmp_path / "local", *_FLAGS) == 0
    files = sorted(path.name for path in (tmp_path / "local").glob("*.safetensors"))
    assert files and len(files) > shards
    (snapshot / "LICENSE").write_text("free")
    assert run_alps(monkeypatch, "prune", "owner/tiny", tmp_path / "again", *_FLAGS) == 0
    own = {"README.md", "report.json", "report.html", "alps.yaml"}
    for file in {path.name for path in snapshot.iterdir()} - {*files, *own}:
        assert (tmp_path / "again" / file).read_bytes() == (snapshot / file).read_bytes(), file
    for file in files:
        assert (tmp_path / "named" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    zeros = sum(int((t == 0).sum()) for file in files for t in load_file(tmp_path / "named" / file).values())
    assert zeros > 0


def test_a_model_that_cannot_be_reached_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run_alps(monkeypatch, "prune", "owner/absent", tmp_path / "out", *_FLAGS) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "owner/absent" in errors
