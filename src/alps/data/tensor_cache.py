"""One tensor per file in the cache folder, with its hash, so that a damaged file is not read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, int64

_NAME = "ids"


def read_cached(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Read an int64 tensor; None when the file is missing or damaged, or its tensor has another shape or type."""
    try:
        with safe_open(path, "pt") as file:
            values: Tensor = file.get_tensor(_NAME)
            sha256 = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return values if values.shape == shape and values.dtype == int64 and _sha256(values) == sha256 else None


def write_cached(path: Path, values: Tensor) -> None:
    """Write an int64 tensor to a file that appears whole or not at all.

    Raises:
        OSError: when it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        os.close(handle)
        save_file({_NAME: values}, partial, metadata={"sha256": _sha256(values)})
        Path(partial).replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().astype("<i8").tobytes()).hexdigest()
