"""The manifest of a packed directory is not trusted, whatever its hash says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alps.checkpoints.pack import pack_directory
from alps.checkpoints.unpack import unpack_directory
from alps.core.errors import CheckpointError
from helpers.packing import resigned, small


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: f.update(version=3), "packed in version 3 .* reads versions up to 2: install a newer alps"),
        (lambda f: f.update(version=0), "packed in version 0"),
        (lambda f: f.update(format="other"), "damaged"),
        (lambda f: f.update(compression="lzma"), "damaged"),
        (lambda f: f.pop("tensors"), "damaged"),
        (lambda f: f["tensors"].pop("a"), "damaged"),
        (lambda f: f["headers"].update({"model.safetensors": "[]"}), "damaged"),
        (lambda f: f["headers"].update({"model.safetensors": '{"a": 3}'}), "damaged"),
        (lambda f: f["headers"].update({"model.safetensors": '{"a": {"data_offsets": [0, "x"]}}'}), "damaged"),
        (
            lambda f: f["tensors"]["a"].update(sha256=f["tensors"]["b"]["sha256"]),
            "Tensor a differs from what was packed",
        ),
        (lambda f: f["tensors"]["a"].update(kept=None), "contradicts itself"),
        (lambda f: f["tensors"]["b"].update(kept=3), "contradicts itself"),
        (lambda f: f["tensors"]["a"].update(shape=[8, 33]), "Tensor a differs from what was packed|cannot be unpacked"),
        (lambda f: f["files"]["config.original.json"].update(name="../config.json"), "damaged"),
        (lambda f: f.update(headers={"/tmp/model.safetensors": "{}"}), "damaged"),
    ],
)
def test_a_manifest_with_a_hash_that_fits_is_not_believed(tmp_path: Path, change: Any, complaint: str) -> None:
    pack_directory(small(tmp_path / "in"), tmp_path / "packed")
    resigned(tmp_path / "packed", change)
    with pytest.raises(CheckpointError, match=complaint):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()
