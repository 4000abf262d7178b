"""Packing from Python: names as text, and the manifests of both ways."""

from __future__ import annotations

from pathlib import Path

import alps
from alps.checkpoints.manifest import read_manifest
from helpers.packing import contents, small


def test_a_checkpoint_is_packed_and_unpacked_by_its_name(tmp_path: Path) -> None:
    source = small(tmp_path / "in")
    manifest = alps.pack(str(source), str(tmp_path / "packed"), compress=True)
    assert manifest.compression == "zstd" and manifest.tensors["a"].stored == "packed"
    assert alps.unpack(str(tmp_path / "packed"), tmp_path / "back") == manifest == read_manifest(tmp_path / "packed")
    assert contents(tmp_path / "back") == contents(source)
    assert alps.pack(source, tmp_path / "plain").compression is None
