"""packed.json: what a packed directory holds, under a hash of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alps.checkpoints.weight_files import is_inside, parse_header
from alps.core.errors import CheckpointError

MANIFEST_NAME = "packed.json"
FORMAT = "alps-packed"
VERSION = 1
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class FileRecord:
    """A file of the packed directory: its length, and the hash of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CopyRecord(FileRecord):
    """A file that was copied along, and the name it has in the checkpoint."""

    name: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the checkpoint.

    Attributes:
        file: the weights file it came from.
        dtype: in the words of safetensors (`BF16`, `F32`, ...).
        shape: as in the checkpoint.
        itemsize: bytes of an element.
        bytes: of the tensor in the checkpoint.
        stored: `packed`, or `dense`.
        stored_bytes: of its parts in the packed directory.
        kept: weights that are not zero, or None where it is stored dense.
        shard: the file of the packed directory that holds its parts.
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


@dataclass(frozen=True)
class Manifest:
    """What a packed directory holds.

    Attributes:
        compression: `zstd`, or None.
        headers: the header of every weights file, to the byte.
        shards: the files that hold the tensors.
        files: all other files, by their names in the packed directory.
        tensors: by their names in the checkpoint.
    """

    compression: str | None
    headers: dict[str, str]
    shards: dict[str, FileRecord]
    files: dict[str, CopyRecord]
    tensors: dict[str, TensorRecord]

    def text(self) -> str:
        """The file: its hash is that of the same text with 64 zeros in the place of the hash."""
        fields = {"format": FORMAT, "version": VERSION, "sha256": _NO_HASH, **dataclasses.asdict(self)}
        text = json.dumps(fields, indent=1) + "\n"
        return text.replace(_NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_manifest(directory: Path) -> Manifest:
    """Read and check packed.json.

    Raises:
        CheckpointError: when there is none, it is damaged, or a later version wrote it.
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
        if version != VERSION:
            raise CheckpointError(
                f"'{directory}' is packed in version {version} of the format, and this alps reads version {VERSION}: "
                "install a newer alps."
            )
        stated = fields["sha256"]
        if hashlib.sha256(data.replace(stated.encode(), _NO_HASH.encode(), 1)).hexdigest() != stated:
            raise CheckpointError(damaged)
        return _build(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(damaged) from None


def _build(fields: dict[str, Any]) -> Manifest:
    found = Manifest(
        compression=fields["compression"],
        headers=dict(fields["headers"]),
        shards={name: FileRecord(**record) for name, record in fields["shards"].items()},
        files={name: CopyRecord(**record) for name, record in fields["files"].items()},
        tensors={name: TensorRecord(**record) for name, record in fields["tensors"].items()},
    )
    names = [*found.headers, *found.shards, *found.files, *(file.name for file in found.files.values())]
    # Nobody's manifest may send a file somewhere else.
    if not all(is_inside(name) for name in names) or found.compression not in (None, "zstd"):
        raise ValueError
    if {entry.name for header in found.headers.values() for entry in parse_header(header)} != found.tensors.keys():
        raise ValueError
    return found
