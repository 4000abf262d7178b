"""Files of a checkpoint other than its weights: which of them pruning leaves as they are, and their copies."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from alps.checkpoints.journal import JOURNAL_NAME
from alps.core.errors import CheckpointError
from alps.core.text_format import format_size

_LOG = logging.getLogger("alps")

# Endings of weights in any format, and of the states of a training.
WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".pb", ".mlmodel", ".mlpackage", ".nemo", ".distcp", ".index.json"),
)
# Written for every output.
OWN_FILES = ("README.md", "report.json", "report.html", "alps.yaml")
# Larger files are data, which a directory may hold as well.
_LARGEST = 256 * 2**20


def find_side_files(directory: Path) -> dict[str, Path]:
    """Find the files of a checkpoint that pruning does not change, by their path inside the directory.

    These are all files but weights, what alps writes itself, names that begin with a dot, and files above 256 MiB,
    which are logged. Folders that hold weights or a journal are left out whole, because they are other checkpoints.

    Raises:
        CheckpointError: when a symbolic link leads to no file, or a folder cannot be read.
    """
    files: dict[str, Path] = {}
    try:
        _collect(directory, "", files)
    except OSError as error:
        raise CheckpointError(f"'{error.filename or directory}' cannot be read: {error.strerror or error}.") from None
    return files


def copy_side_files(directory: Path, folder: Path) -> list[str]:
    """Copy the files that `find_side_files` finds, byte for byte, and return their names.

    Raises:
        CheckpointError: when a file cannot be read.
    """
    files = find_side_files(directory)
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
        shutil.copyfile(path, target)
    return list(files)


def is_weight_file(name: str) -> bool:
    """Check by its name if a file holds weights, or is their index."""
    return name.lower().endswith(WEIGHT_ENDINGS)


def _collect(directory: Path, prefix: str, files: dict[str, Path]) -> None:
    for path in sorted(directory.iterdir()):
        name = f"{prefix}{path.name}"
        if path.name.startswith(".") and path.name != ".gitattributes":
            continue
        if path.is_dir():
            if not path.is_symlink() and not _is_other_output(path):
                _collect(path, f"{name}/", files)
        elif is_weight_file(path.name) or name in OWN_FILES:
            continue
        elif not path.is_file():
            raise CheckpointError(f"'{path}' is a symbolic link to no file: put the file there, or remove the link.")
        elif (size := path.stat().st_size) > _LARGEST:
            _LOG.warning(f"'{path}' is not copied, because its {format_size(size)} are more than a model's text files.")
        else:
            files[name] = path


def _is_other_output(folder: Path) -> bool:
    """Check if a folder holds weights, the journal of a run, or a Python environment."""
    if any((folder / name).exists() for name in (JOURNAL_NAME, "pyvenv.cfg")):
        return True
    return any(is_weight_file(path.name) for path in folder.rglob("*"))
