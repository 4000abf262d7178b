"""The files of a model that is given by its hub name, in the cache of downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME

# None in place of an error: whoever loads the model whole says what is wrong.
_MAY_LACK: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def find_cached(name: str, file: str) -> Path | None:
    """A file of a directory or of a hub model, fetched where it is not cached; None where it cannot be had."""
    path = cached_file(name, file, **_MAY_LACK)
    return None if path is None else Path(path)


def fetched_directory(name: str) -> Path | None:
    """The directory in the cache that holds the configuration and the safetensors files of a hub model.

    What is missing there is fetched: the weights that transformers would load, and no others. None where the model has
    no safetensors files or cannot be reached.
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
