"""The configuration of a packed directory: what is added to it, and that nothing else differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from alps.checkpoints.manifest import Manifest, read_manifest
from alps.checkpoints.pack import pack_directory
from alps.checkpoints.packed_config import check_packed_config
from alps.core.errors import CheckpointError
from helpers.packing import small


def packed(folder: Path, config: Any) -> tuple[Path, Manifest]:
    source = small(folder / "in", {"count": torch.ones(2, dtype=torch.int64), "weight": torch.ones(3).half()})
    (source / "config.json").write_text(json.dumps(config))
    pack_directory(source, folder / "packed")
    return folder / "packed", read_manifest(folder / "packed")


def test_the_format_and_the_dtype_are_added(tmp_path: Path) -> None:
    original = {"model_type": "llama", "text_config": {"width": 8}, "quantization_config": None}
    folder, manifest = packed(tmp_path, original)
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "alps"}
    assert config == {
        "dtype": "float16",  # as transformers would take it from the first tensor, which has one
        "model_type": "llama",
        "text_config": {"width": 8, "quantization_config": method},
        "quantization_config": method,
        "auto_map": {"AutoConfig": "alps_packed.ConfigLoader"},
    }
    assert json.loads((folder / "config.original.json").read_text()) == original
    with safe_open(folder / "alps.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
    check_packed_config(folder, manifest)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_kept(tmp_path: Path, name: str) -> None:
    folder, _ = packed(tmp_path, {name: "bfloat16"})
    config = json.loads((folder / "config.json").read_text())
    assert {key: value for key, value in config.items() if "dtype" in key} == {name: "bfloat16"}


def test_every_other_difference_is_refused(tmp_path: Path) -> None:
    folder, manifest = packed(tmp_path, {"model_type": "llama", "theta": 3.0})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # Later versions may refer to the format in other words.
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "alps", "more": 1}}))
    check_packed_config(folder, manifest)
    for change in ({"theta": 4.0}, {"dtype": "float32"}, {"new": None}):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=r"config.json' differs from config.original.json: fetch"):
            check_packed_config(folder, manifest)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config.json' is missing or no JSON"):
        check_packed_config(folder, manifest)


def test_without_a_configuration_nothing_is_added(tmp_path: Path) -> None:
    source = small(tmp_path / "in")
    (source / "config.json").unlink()
    manifest = pack_directory(source, tmp_path / "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {"README.md", "packed.json", "packed.safetensors"}
    check_packed_config(tmp_path / "packed", manifest)
