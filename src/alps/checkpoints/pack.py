"""Packing of a checkpoint: shards of masks and values, a manifest with hashes, and copies of all other files."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alps.checkpoints.atomic_io import check_target, new_directory
from alps.checkpoints.bitmask_codec import count_kept
from alps.checkpoints.compression import check_compression, raw_bytes
from alps.checkpoints.manifest import (
    FORMAT,
    MANIFEST_NAME,
    CopyRecord,
    FileRecord,
    Manifest,
    TensorRecord,
)
from alps.checkpoints.packed_config import RENAMED, write_config
from alps.checkpoints.tensor_codec import encode_tensor, should_pack
from alps.checkpoints.weight_files import (
    INDEX_NAME,
    HeaderEntry,
    WeightFile,
    find_other_files,
    find_weight_files,
    parse_header,
)
from alps.core.errors import CheckpointError

SHARD_BYTES = 2**30
# Files of the checkpoint that would be wrong descriptions of the packed directory under their own names.
_RENAMED = {"README.md": "README.original.md", INDEX_NAME: "index.original.json", **RENAMED}
_PACKED_FILE = re.compile(r"packed\.json|packed(-\d+(-of-\d+)?)?\.safetensors")
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---\r?\n", re.DOTALL | re.MULTILINE)
# A model hub would show how to load the pack with this library, which cannot.
_LIBRARY = re.compile(r"^library_name:.*\n", re.MULTILINE)
_NOTICE = """
> **Packed: zeros are not stored.** These files hold the checkpoint in a format that transformers reads only with alps
> (the Python package `alps-prune`):
>
> ```python
> import alps
> from transformers import AutoModelForCausalLM
>
> model = AutoModelForCausalLM.from_pretrained("THIS-DIRECTORY")
> ```
>
> This gives the checkpoint back, to the bit:
>
> ```sh
> alps unpack THIS-DIRECTORY NEW-DIRECTORY
> ```
"""


class _ShardWriter:
    """Safetensors files that are filled one after the other, each up to a size in bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._parts: dict[str, Tensor] = {}
        self._written: list[Path] = []

    def add(self, parts: dict[str, Tensor]) -> int:
        """Put tensors into one file, and return its number, counted from 0."""
        if self._parts and _nbytes(self._parts) + _nbytes(parts) > self._limit:
            self._flush()
        self._parts |= parts
        return len(self._written)

    def close(self) -> list[str]:
        """Write the last file, give all files their final names, and return these."""
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
            # One entry alone, because safetensors writes several in a random order.
            save_file(self._parts, path, {"format": FORMAT})
        except SafetensorError as error:
            raise CheckpointError(f"A file of the packed directory cannot be written: {error}.") from None
        self._written.append(path)
        self._parts = {}


def pack_directory(
    source: Path,
    out: Path,
    compress: bool = False,
    shard_bytes: int = SHARD_BYTES,
    *,
    find_dense_in_memory: Callable[[Path], Mapping[str, str]] | None = None,
) -> Manifest:
    """Pack a checkpoint; one shard is in memory at a time.

    Args:
        source: a directory with safetensors files.
        out: directory to create; it appears whole or not at all.
        compress: compress masks and values by zstd, for transport.
        shard_bytes: largest size of a file of `out`; a single tensor may exceed it.
        find_dense_in_memory: returns, for the source, what `write_pack` takes as `dense_in_memory`; called after all
            checks.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: when the source cannot be packed, or `out` cannot be written.
    """
    if source.is_dir() and (
        packed_files := sorted(path.name for path in source.iterdir() if _PACKED_FILE.fullmatch(path.name))
    ):
        raise CheckpointError(
            f"'{source}' holds {packed_files[0]}, so it is packed already: give the checkpoint itself."
        )
    weights = find_weight_files(source)
    others = find_other_files(source, weights)
    if compress:
        check_compression()
    check_target(out)
    with new_directory(out) as folder:
        return write_pack(
            folder,
            _read_tensors(weights),
            headers={file.name: file.header for file in weights},
            files=others,
            compress=compress,
            shard_bytes=shard_bytes,
            dense_in_memory=find_dense_in_memory(source) if find_dense_in_memory else {},
        )


def write_pack(
    folder: Path,
    tensors: Iterable[tuple[str, HeaderEntry, Tensor]],
    *,
    headers: dict[str, str],
    files: dict[str, Path],
    compress: bool = False,
    shard_bytes: int = SHARD_BYTES,
    dense_in_memory: Mapping[str, str] | None = None,
) -> Manifest:
    """Write all files of a packed directory; one shard is in memory at a time.

    Args:
        folder: that exists; no file of it may have the name of one that is written.
        tensors: for every tensor the name of its weight file, its entry in the header of that file, and its values.
        headers: headers of the weight files by name.
        files: all other files by their names in the checkpoint.
        compress: compress masks and values by zstd.
        shard_bytes: largest size of a shard; a single tensor may exceed it.
        dense_in_memory: reasons why tensors are dense in memory if they are packed, by their names.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: when two files hold the same tensor, or a shard cannot be written.
    """
    names, shards = _tensor_names(headers), _ShardWriter(folder, shard_bytes)
    entries = list(_pack_tensors(tensors, shards, names=names, compress=compress))
    shard_names = shards.close()
    records = {name: replace(record, shard=shard_names[number]) for name, record, number in entries}
    reasons = dense_in_memory or {}
    manifest = Manifest(
        compression="zstd" if compress else None,
        headers=headers,
        shards={name: FileRecord(*size_and_hash(folder / name)) for name in shard_names},
        files=_copy(files, folder),
        tensors=records,
        dense_in_memory={name: reasons[name] for name in reasons if name in records and records[name].kept is not None},
    )
    _write_readme(files.get("README.md"), folder)
    write_config(folder, manifest)
    (folder / MANIFEST_NAME).write_text(manifest.text())
    return manifest


def size_and_hash(path: Path) -> tuple[int, str]:
    """Return length in bytes and sha256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(weights: list[WeightFile]) -> Iterator[tuple[str, HeaderEntry, Tensor]]:
    """Yield every tensor of a checkpoint with the name of its file and its entry in the header."""
    for file in weights:
        with safe_open(file.path, framework="pt") as opened:
            for entry in parse_header(file.header):
                try:
                    tensor = opened.get_tensor(entry.name)
                except SafetensorError as error:
                    raise CheckpointError(f"Tensor {entry.name} of '{file.path}' cannot be read: {error}.") from None
                yield file.name, entry, tensor


def _pack_tensors(
    tensors: Iterable[tuple[str, HeaderEntry, Tensor]], shards: _ShardWriter, *, names: set[str], compress: bool
) -> Iterator[tuple[str, TensorRecord, int]]:
    """Add every tensor to the shards, and yield its name, its record and the number of its shard."""
    for file, entry, tensor in tensors:
        packed = should_pack(entry.name, tensor, names)
        parts = encode_tensor(entry.name, tensor, packed, compress)
        record = TensorRecord(
            file=file,
            dtype=entry.dtype,
            shape=list(entry.shape),
            itemsize=tensor.element_size(),
            bytes=entry.nbytes,
            stored="packed" if packed else "dense",
            stored_bytes=_nbytes(parts),
            kept=count_kept(tensor) if packed else None,
            shard="",
            sha256=hashlib.sha256(raw_bytes(tensor)).hexdigest(),
        )
        yield entry.name, record, shards.add(parts)


def _tensor_names(headers: dict[str, str]) -> set[str]:
    """Return the names of all tensors, after checking that no two files hold the same one."""
    owners: dict[str, str] = {}
    for file, header in headers.items():
        for entry in parse_header(header):
            if entry.name in owners:
                raise CheckpointError(
                    f"Tensor {entry.name} is in both {owners[entry.name]} and {file}: save the model again."
                )
            owners[entry.name] = file
    return set(owners)


def _copy(files: dict[str, Path], folder: Path) -> dict[str, CopyRecord]:
    """Copy files by their names in the checkpoint, and return records by their names in the packed directory."""
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
    """Write README.md: the front matter of the checkpoint's card, how to load the pack, the text of the card."""
    text = card.read_bytes().decode(errors="replace") if card else ""
    front = match[0] if (match := _FRONT_MATTER.match(text)) else ""
    body = text[len(front) :].strip()
    front = _LIBRARY.sub("", front)
    below = f"\nBelow is the card of the checkpoint that was packed.\n\n{body}\n" if body else ""
    (folder / "README.md").write_text(f"{front}{_NOTICE}{below}".lstrip(), encoding="utf-8")


def _nbytes(parts: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())
