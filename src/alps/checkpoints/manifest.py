"""Manifest of a packed directory, packed.json: its files and tensors with their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alps.checkpoints.weight_files import is_inside, parse_header
from alps.core.errors import CheckpointError
from alps.core.json_text import to_json

MANIFEST_NAME = "packed.json"
FORMAT = "alps-packed"
# Since version 2 config.json names the format, and the checkpoint's own has another name.
VERSION = 2
_READABLE = (1, 2)
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class FileRecord:
    """Length and hash of a file of the packed directory."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CopyRecord(FileRecord):
    """File that was copied unchanged, and its name in the checkpoint."""

    name: str


@dataclass(frozen=True)
class TensorRecord:
    """Tensor of the checkpoint.

    Attributes:
        file: weight file that it came from.
        dtype: in the names of safetensors (`BF16`, `F32`, ...).
        shape: in the checkpoint.
        itemsize: bytes of an element.
        bytes: of the tensor in the checkpoint.
        stored: `packed` or `dense`.
        stored_bytes: of its parts in the packed directory.
        kept: number of weights that are not zero; None when it is stored dense.
        shard: file of the packed directory that holds its parts.
        sha256: of its bytes in the checkpoint.
    """

    file: str
    dtype: str
    shape: list[int]
    itemsize: int
    bytes: int
    stored: str
    stored_bytes: int
    kept: int | None
    shard: str
    sha256: str


@dataclass(frozen=True, repr=False)
class Manifest:
    """Content of a packed directory.

    Attributes:
        compression: `zstd` or None.
        headers: header of every weight file of the checkpoint, byte by byte.
        shards: files that hold the parts of tensors.
        files: all other files, by their names in the packed directory.
        tensors: by their names in the checkpoint.
        dense_in_memory: packed tensors that a model has dense when it is loaded, each with the reason.
    """

    compression: str | None
    headers: dict[str, str]
    shards: dict[str, FileRecord]
    files: dict[str, CopyRecord]
    tensors: dict[str, TensorRecord]
    dense_in_memory: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Summarise the content in a line, for notebooks."""
        packed = sum(record.kept is not None for record in self.tensors.values())
        before = sum(record.bytes for record in self.tensors.values())
        after = sum(record.stored_bytes for record in self.tensors.values())
        return f"Manifest: {packed} of {len(self.tensors)} tensors packed, {before:,} -> {after:,} bytes"

    def text(self) -> str:
        """Return the content of packed.json, with its own hash: that of the same text with 64 zeros as the hash."""
        fields = {"format": FORMAT, "version": VERSION, "sha256": _NO_HASH, **dataclasses.asdict(self)}
        text = to_json(fields, indent=1) + "\n"
        return text.replace(_NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_manifest(directory: Path) -> Manifest:
    """Read and check packed.json.

    Raises:
        CheckpointError: when it is missing, is damaged, or has a version that this alps does not read.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"'{directory}' is not a packed directory: it has no {MANIFEST_NAME}.")
    damaged = f"'{path}' is damaged: fetch the packed directory again."
    data = path.read_bytes()
    try:
        fields: Any = json.loads(data)
        version = fields["version"]
        if fields["format"] != FORMAT or not isinstance(version, int):
            raise CheckpointError(damaged)
        if version not in _READABLE:
            raise CheckpointError(
                f"'{directory}' is packed in version {version} of the format, and this alps reads versions up to "
                f"{VERSION}: install a newer alps."
            )
        stated = fields["sha256"]
        if hashlib.sha256(data.replace(stated.encode(), _NO_HASH.encode(), 1)).hexdigest() != stated:
            raise CheckpointError(damaged)
        return _parse(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(damaged) from None


def _parse(fields: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        compression=fields["compression"],
        headers=dict(fields["headers"]),
        shards={name: FileRecord(**record) for name, record in fields["shards"].items()},
        files={name: CopyRecord(**record) for name, record in fields["files"].items()},
        tensors={name: TensorRecord(**record) for name, record in fields["tensors"].items()},
        dense_in_memory={str(name): str(reason) for name, reason in fields.get("dense_in_memory", {}).items()},
    )
    originals = [file.name for file in manifest.files.values()]
    # A manifest is not trusted: its names must not lead out of the directories that are read and written.
    names = [*manifest.headers, *manifest.shards, *manifest.files, *originals]
    if not all(is_inside(name) for name in names) or manifest.compression not in (None, "zstd"):
        raise ValueError
    in_headers = {entry.name for header in manifest.headers.values() for entry in parse_header(header)}
    if in_headers != manifest.tensors.keys():
        raise ValueError
    return manifest
