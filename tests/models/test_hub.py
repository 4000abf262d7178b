"""A model given by its hub name is streamed from the cache of downloads, here laid out as the hub's client does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import cli_process as started

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FLAGS = ("--sparsity", "0.5", "--method", "magnitude", "--no-errors")


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


def _prune(name: str, out: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    # A new interpreter: the hub's client reads its variables when it is imported.
    command = [sys.executable, "-m", "alps", "prune", name, str(out), *_FLAGS]
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("shards", [False, True])
def test_it_is_pruned_as_from_its_directory_and_not_loaded_whole(stories: Path, tmp_path: Path, shards: bool) -> None:
    snapshot = _cache(stories, tmp_path / "cache", shards)
    assert (snapshot / "model.safetensors.index.json").is_file() == shards
    named = _prune("owner/tiny", tmp_path / "named", tmp_path / "cache")
    assert named.returncode == 0 and "in memory whole" not in named.stderr, named.stderr
    local = started.run("prune", snapshot, tmp_path / "local", *_FLAGS)
    assert local.returncode == 0, local.stderr
    files = sorted(path.name for path in (tmp_path / "local").glob("*.safetensors"))
    assert files and len(files) > shards
    for file in files:
        assert (tmp_path / "named" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    zeros = sum(int((t == 0).sum()) for file in files for t in load_file(tmp_path / "named" / file).values())
    assert zeros > 0


def test_one_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    done = _prune("owner/absent", tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "owner/absent" in done.stderr
