"""A packed directory is checked and becomes the checkpoint again, to the byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alps.checkpoints.atomic_io import check_target, new_directory
from alps.checkpoints.compression import check_compression, raw
from alps.checkpoints.manifest import Manifest, TensorRecord, read_manifest
from alps.checkpoints.pack import size_and_hash
from alps.checkpoints.tensor_codec import merge
from alps.checkpoints.weight_files import parse_header
from alps.core.errors import CheckpointError


def unpack_directory(packed: Path, out: Path) -> Manifest:
    """Write the checkpoint that was packed: same files, same bytes; one tensor is in memory at a time.

    Args:
        packed: a directory that `pack_directory` wrote.
        out: directory to create; it appears whole or not at all.

    Raises:
        CheckpointError: when a file of `packed` is missing or differs from what was written, a later version wrote it,
            or `out` cannot be written.
    """
    manifest = read_manifest(packed)
    if manifest.compression:
        check_compression()
    check_target(out)
    for name, record in {**manifest.shards, **manifest.files}.items():
        check_file(packed / name, record.bytes, record.sha256)
    with new_directory(out) as folder, ExitStack() as stack:
        for stored, copied in manifest.files.items():
            (folder / copied.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(packed / stored, folder / copied.name)
        try:
            shards = {name: stack.enter_context(safe_open(packed / name, framework="pt")) for name in manifest.shards}
            for file, header in manifest.headers.items():
                _write_weights(folder / file, header, manifest, lambda shard: shards[shard].get_tensor)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{packed}' contradicts itself ({error}): pack the checkpoint again.") from None
    return manifest


def check_file(path: Path, size: int, sha256: str) -> None:
    """Make sure that a file is the one that was written.

    Raises:
        CheckpointError: when it is missing, or has another length or hash.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing: fetch the packed directory again.")
    if (found := path.stat().st_size) != size:
        raise CheckpointError(f"'{path}' has {found:,} bytes instead of {size:,}: fetch the packed directory again.")
    if size_and_hash(path)[1] != sha256:
        raise CheckpointError(f"'{path}' is damaged, its sha256 is another: fetch the packed directory again.")


def _write_weights(
    path: Path, header: str, manifest: Manifest, reader: Callable[[str], Callable[[str], Tensor]]
) -> None:
    """Header first, then the tensors in the order in which the header puts them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header.encode()).to_bytes(8, "little"))
        file.write(header.encode())
        for entry in parse_header(header):
            record = manifest.tensors[entry.name]
            file.write(_read(entry.name, record, bool(manifest.compression), reader(record.shard)))


def _read(name: str, record: TensorRecord, compressed: bool, part: Callable[[str], Tensor]) -> memoryview:
    """The bytes of a tensor as the checkpoint had them."""
    try:
        data = raw(merge(name, record.shape, record.itemsize, record.kept, compressed, part))
    except ValueError as error:
        raise CheckpointError(f"Tensor {name} cannot be unpacked, {error}: pack the checkpoint again.") from None
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(f"Tensor {name} differs from what was packed: fetch or pack the checkpoint again.")
    return data
