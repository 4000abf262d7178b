"""Unpacking of a packed directory: every file is checked, and the checkpoint is restored byte by byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from alps.checkpoints.atomic_io import check_target, new_directory
from alps.checkpoints.compression import check_compression, raw_bytes
from alps.checkpoints.manifest import MANIFEST_NAME, Manifest, TensorRecord, read_manifest
from alps.checkpoints.pack import size_and_hash
from alps.checkpoints.packed_config import RENAMED
from alps.checkpoints.tensor_codec import ReadPart, decode_tensor
from alps.checkpoints.weight_files import find_other_files, parse_header
from alps.core.errors import CheckpointError


def unpack_directory(packed: Path, out: Path) -> Manifest:
    """Restore the checkpoint that was packed, with the same files and bytes; one tensor is in memory at a time.

    Files that were put into the directory later, such as a tokenizer next to a model that saved itself, are copied.

    Args:
        packed: a directory that `pack_directory` wrote.
        out: directory to create; it appears whole or not at all.

    Returns:
        The manifest of the packed directory.

    Raises:
        CheckpointError: when a file of `packed` is missing or was changed, this alps does not read its version, or
            `out` cannot be written.
    """
    manifest = read_manifest(packed)
    if manifest.compression:
        check_compression()
    check_target(out)
    for name, record in {**manifest.shards, **manifest.files}.items():
        check_file(packed / name, record.bytes, record.sha256)
    with new_directory(out) as folder, ExitStack() as stack:
        for stored_name, name in {**_added_files(packed, manifest), **_original_names(manifest)}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(packed / stored_name, folder / name)
        try:
            shards = {name: stack.enter_context(safe_open(packed / name, framework="pt")) for name in manifest.shards}
            for file, header in manifest.headers.items():
                _write_weights(folder / file, header, manifest, lambda shard: shards[shard].get_tensor)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{packed}' contradicts itself ({error}): pack the checkpoint again.") from None
    return manifest


def _original_names(manifest: Manifest) -> dict[str, str]:
    return {stored: record.name for stored, record in manifest.files.items()}


def _added_files(packed: Path, manifest: Manifest) -> dict[str, str]:
    """Return the files of a packed directory that are neither part of what was packed nor written by packing."""
    own = {MANIFEST_NAME, "README.md", *RENAMED, *manifest.shards, *manifest.files}
    restored = {*manifest.headers, *_original_names(manifest).values()}
    return {name: name for name in find_other_files(packed, []) if name not in own | restored}


def check_file(path: Path, size: int, sha256: str) -> None:
    """Check that a file has the length in bytes and the sha256 with which it was written.

    Raises:
        CheckpointError: when it is missing, or differs.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing: fetch the packed directory again.")
    if (length := path.stat().st_size) != size:
        raise CheckpointError(f"'{path}' has {length:,} bytes instead of {size:,}: fetch the packed directory again.")
    if size_and_hash(path)[1] != sha256:
        raise CheckpointError(f"'{path}' is damaged, its sha256 is another: fetch the packed directory again.")


def _write_weights(path: Path, header: str, manifest: Manifest, reader_of: Callable[[str], ReadPart]) -> None:
    """Write a weight file: its header, then the tensors in the order of the header.

    Args:
        path: of the file.
        header: of the file, as text.
        manifest: of the packed directory.
        reader_of: returns, for the name of a shard, the function that reads its parts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header.encode()).to_bytes(8, "little"))
        file.write(header.encode())
        for entry in parse_header(header):
            record = manifest.tensors[entry.name]
            file.write(_decode(entry.name, record, bool(manifest.compression), reader_of(record.shard)))


def _decode(name: str, record: TensorRecord, compressed: bool, read_part: ReadPart) -> memoryview:
    """Return the bytes of a tensor, checked against the hash of the checkpoint's."""
    try:
        data = raw_bytes(decode_tensor(name, record, compressed, read_part))
    except ValueError as error:
        raise CheckpointError(f"Tensor {name} cannot be unpacked, {error}: pack the checkpoint again.") from None
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(f"Tensor {name} differs from what was packed: fetch or pack the checkpoint again.")
    return data
