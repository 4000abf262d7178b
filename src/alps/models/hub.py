"""Files of hub models in the download cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from alps.checkpoints.side_files import WEIGHT_ENDINGS
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME
from alps.core.errors import first_line

_LOG = logging.getLogger("alps")

# Return None in place of an error: loading the whole model will raise a better one.
_NONE_IF_UNAVAILABLE: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def find_cached(name: str, file: str) -> Path | None:
    """Return a file of a checkpoint, fetched from the hub when it is not cached.

    Args:
        name: directory or hub name of the checkpoint.
        file: name of the file.

    Returns:
        Its path; None when the checkpoint has no such file or cannot be reached.
    """
    path = cached_file(name, file, **_NONE_IF_UNAVAILABLE)
    return None if path is None else Path(path)


def checkpoint_directory(name: str) -> Path | None:
    """Return the directory of a checkpoint with all files other than its weights, which are fetched for a hub model.

    Args:
        name: directory, GGUF file, or hub name.

    Returns:
        The directory; None for a GGUF file.
    """
    path = Path(name).expanduser()
    if path.exists() or name.endswith(".gguf"):
        return path if path.is_dir() else None
    config = find_cached(name, "config.json")
    try:
        folder = Path(snapshot_download(name, ignore_patterns=[f"*{ending}" for ending in WEIGHT_ENDINGS]))
    except Exception as error:  # whatever the hub's client raises without a network
        _LOG.warning(
            f"Some files of '{name}' cannot be fetched ({first_line(error)}): an output has those in the cache."
        )
        return None if config is None else config.parent
    return folder


def fetch_directory(name: str) -> Path | None:
    """Return the cache directory with the configuration and the safetensors files of a hub model.

    Files that are not cached are fetched; of weights, only those that transformers would load.

    Returns:
        The directory; None when the model has no safetensors files or cannot be reached.
    """
    config = find_cached(name, "config.json")
    if config is None:
        return None
    if find_cached(name, SINGLE_NAME) is None:
        index = find_cached(name, INDEX_NAME)
        if index is None:
            return None
        get_checkpoint_shard_files(name, str(index))
    find_cached(name, "generation_config.json")
    return config.parent
