"""Packing of checkpoints from Python."""

from __future__ import annotations

from pathlib import Path

from alps.checkpoints.manifest import Manifest
from alps.checkpoints.pack import pack_directory
from alps.checkpoints.unpack import unpack_directory
from alps.inference.dense_in_memory import find_dense_in_memory
from alps.models.load import check_architecture


def pack(directory: str | Path, out: str | Path, *, compress: bool = False) -> Manifest:
    """Store a pruned checkpoint without its zeros.

    The result says which tensors are dense in memory when `alps.load` reads it, and why.

    Args:
        directory: checkpoint directory with safetensors files.
        out: directory to create.
        compress: compress the files with zstd, for transport.

    Returns:
        The content of `out`, tensor by tensor.

    Raises:
        CheckpointError: when the checkpoint cannot be packed, or `out` cannot be written.
        UnsupportedModel: when it is no causal language model.
    """
    check_architecture(directory)
    return pack_directory(Path(directory), Path(out), compress, find_dense_in_memory=find_dense_in_memory)


def unpack(packed: str | Path, out: str | Path) -> Manifest:
    """Write the checkpoint that was packed, with the same files and bytes.

    Args:
        packed: directory that `pack` wrote.
        out: directory to create.

    Returns:
        The content of `packed`, tensor by tensor.

    Raises:
        CheckpointError: when a file is missing or damaged, or `out` cannot be written.
    """
    return unpack_directory(Path(packed), Path(out))
