"""A packed directory is written: shards of masks and values, a manifest with hashes, all other files along."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alps.checkpoints.atomic_io import check_target, new_directory
from alps.checkpoints.bitmask_codec import kept_weights
from alps.checkpoints.compression import check_compression, raw
from alps.checkpoints.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    CopyRecord,
    FileRecord,
    Manifest,
    TensorRecord,
)
from alps.checkpoints.tensor_codec import is_packed, split
from alps.checkpoints.weight_files import INDEX_NAME, WeightFile, find_weights, other_files, parse_header
from alps.core.errors import CheckpointError

SHARD_BYTES = 2**30
# Under their own names these would describe the packed directory, and describe it wrongly.
_RENAMED = {"README.md": "README.original.md", INDEX_NAME: "index.original.json"}
_OURS = re.compile(r"packed\.json|packed(-\d+(-of-\d+)?)?\.safetensors")
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---\r?\n", re.DOTALL | re.MULTILINE)
# A hub would tell people to load the pack with this library.
_LIBRARY = re.compile(r"^library_name:.*\n", re.MULTILINE)
_NOTICE = """
> **Packed: zeros are not stored.** These files hold the checkpoint in a format of its own, which transformers does not
> read. With alps (the Python package `alps-prune`) installed, this gives the checkpoint back, to the bit:
>
> ```sh
> alps unpack THIS-DIRECTORY NEW-DIRECTORY
> ```
"""


class _Shards:
    """Safetensors files that are filled one after the other, each up to a size."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._parts: dict[str, Tensor] = {}
        self._written: list[Path] = []

    def add(self, parts: dict[str, Tensor]) -> int:
        """Put tensors into the same file; returns its number from 0."""
        if self._parts and _nbytes(self._parts) + _nbytes(parts) > self._limit:
            self._flush()
        self._parts |= parts
        return len(self._written)

    def close(self) -> list[str]:
        """Write what is left; returns the names of all files."""
        self._flush()
        count = len(self._written)
        names = [f"packed-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        if count == 1:
            names = ["packed.safetensors"]
        for path, name in zip(self._written, names, strict=True):
            path.rename(self._folder / name)
        return names

    def _flush(self) -> None:
        path = self._folder / f"packed-{len(self._written) + 1:05}.safetensors"
        try:
            save_file(self._parts, path, {"format": FORMAT, "version": str(VERSION)})
        except SafetensorError as error:
            raise CheckpointError(f"A file of the packed directory cannot be written: {error}.") from None
        self._written.append(path)
        self._parts = {}


def pack_directory(source: Path, out: Path, compress: bool = False, shard_bytes: int = SHARD_BYTES) -> Manifest:
    """Pack a checkpoint; the weights are read one tensor at a time, and one shard is in memory.

    Args:
        source: a directory with safetensors files.
        out: directory to create; it appears whole or not at all.
        compress: for transport: zstd over masks and values.
        shard_bytes: no file of `out` is larger, unless a single tensor is.

    Raises:
        CheckpointError: when the source cannot be packed, or `out` not be written.
    """
    if source.is_dir() and (taken := sorted(path.name for path in source.iterdir() if _OURS.fullmatch(path.name))):
        raise CheckpointError(f"'{source}' holds {taken[0]}, so it is packed already: give the checkpoint itself.")
    weights = find_weights(source)
    others = other_files(source, weights)
    if compress:
        check_compression()
    check_target(out)
    with new_directory(out) as folder:
        shards = _Shards(folder, shard_bytes)
        placed = list(_pack_tensors(weights, shards, compress))
        names = shards.close()
        records = {name: replace(record, shard=names[number]) for name, record, number in placed}
        files = _copy(others, folder)
        _write_readme(others.get("README.md"), folder)
        manifest = Manifest(
            compression="zstd" if compress else None,
            headers={file.name: file.header for file in weights},
            shards={name: FileRecord(*size_and_hash(folder / name)) for name in names},
            files=files,
            tensors=records,
        )
        (folder / MANIFEST_NAME).write_text(manifest.text())
    return manifest


def size_and_hash(path: Path) -> tuple[int, str]:
    """Length and sha256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _pack_tensors(
    weights: list[WeightFile], shards: _Shards, compress: bool
) -> Iterator[tuple[str, TensorRecord, int]]:
    """Name, record and number of the shard of every tensor, as it is put there."""
    owners: dict[str, str] = {}
    for file in weights:
        for entry in parse_header(file.header):
            if entry.name in owners:
                raise CheckpointError(
                    f"Tensor {entry.name} is in both {owners[entry.name]} and {file.name}: save the model again."
                )
            owners[entry.name] = file.name
    for file in weights:
        with safe_open(file.path, framework="pt") as opened:
            for entry in parse_header(file.header):
                try:
                    tensor = opened.get_tensor(entry.name)
                except SafetensorError as error:
                    raise CheckpointError(f"Tensor {entry.name} of '{file.path}' cannot be read: {error}.") from None
                packed = is_packed(entry.name, tensor, owners)
                parts = split(entry.name, tensor, packed, compress)
                record = TensorRecord(
                    file=file.name,
                    dtype=entry.dtype,
                    shape=list(entry.shape),
                    itemsize=tensor.element_size(),
                    bytes=entry.nbytes,
                    stored="packed" if packed else "dense",
                    stored_bytes=_nbytes(parts),
                    kept=kept_weights(tensor) if packed else None,
                    shard="",
                    sha256=hashlib.sha256(raw(tensor)).hexdigest(),
                )
                yield entry.name, record, shards.add(parts)


def _copy(files: dict[str, Path], folder: Path) -> dict[str, CopyRecord]:
    records = {}
    for name, path in files.items():
        stored = _RENAMED.get(name, name)
        while name in _RENAMED and stored in files:
            stored = f"_{stored}"
        (folder / stored).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / stored)
        records[stored] = CopyRecord(*size_and_hash(folder / stored), name=name)
    return records


def _write_readme(card: Path | None, folder: Path) -> None:
    """README.md: how to load the pack, between the front matter of the checkpoint's own card and its text."""
    text = card.read_bytes().decode(errors="replace") if card else ""
    front = match[0] if (match := _FRONT_MATTER.match(text)) else ""
    rest = text[len(front) :].strip()
    front = _LIBRARY.sub("", front)
    below = f"\nBelow is the card of the checkpoint that was packed.\n\n{rest}\n" if rest else ""
    (folder / "README.md").write_text(f"{front}{_NOTICE}{below}".lstrip(), encoding="utf-8")


def _nbytes(parts: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())
