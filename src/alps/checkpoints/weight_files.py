"""Files of a checkpoint directory: the weight files with their headers, and all others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from alps.checkpoints.quantization import check_quantization
from alps.core.errors import CheckpointError, truncate

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class HeaderEntry:
    """Tensor in the header of a safetensors file; the dtype is that format's name (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WeightFile:
    """Safetensors file: its name in the checkpoint, its path, and its header with the spaces at the end."""

    name: str
    path: Path
    header: str


def find_weight_files(directory: Path) -> list[WeightFile]:
    """Find the safetensors files that transformers would load, and check their headers and the index.

    Raises:
        CheckpointError: when there are none, one is missing or damaged, or the weights are quantized.
    """
    if not directory.is_dir():
        raise CheckpointError(f"'{directory}' is not a directory: give the folder of a checkpoint.")
    check_quantization(read_config(directory), str(directory))
    if (directory / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    elif (directory / INDEX_NAME).is_file():
        names = sorted(set(_read_index(directory / INDEX_NAME).values()))
    else:
        raise CheckpointError(
            f"'{directory}' holds neither {SINGLE_NAME} nor {INDEX_NAME}: save the model with save_pretrained first."
        )
    files = [WeightFile(name, directory / name, _read_header(directory / name)) for name in names]
    if names != [SINGLE_NAME]:
        _check_index(directory / INDEX_NAME, files)
    return files


def read_weight_file(path: Path) -> WeightFile:
    """Read the header of a safetensors file, and check it against the length of the file.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    return WeightFile(path.name, path, _read_header(path))


def check_pickle_index(directory: Path) -> None:
    """Refuse an index of pickled weights that names files outside its directory or missing ones; none is read.

    Raises:
        CheckpointError: when it does, or is damaged.
    """
    if (directory / PICKLE_INDEX_NAME).is_file():
        for name in sorted(set(_read_index(directory / PICKLE_INDEX_NAME).values())):
            _check_exists(directory / name)


def find_other_files(directory: Path, weights: list[WeightFile]) -> dict[str, Path]:
    """Find all files that are not weight files, by their path inside the directory.

    Names that begin with a dot are left out. Symbolic links are followed.

    Raises:
        CheckpointError: when a link leads nowhere, or to a folder.
    """
    weight_names = {file.name for file in weights}
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() and not path.is_file():
            raise CheckpointError(f"'{path}' is a symbolic link to no file: put the file there, or remove the link.")
        if path.is_file() and name.as_posix() not in weight_names:
            files[name.as_posix()] = path
    return files


def is_inside(name: str) -> bool:
    """Check that a relative file name does not lead out of the directory that it is joined to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and name == str(path)


def parse_header(header: str) -> list[HeaderEntry]:
    """Return the tensors of a safetensors header in the order of their bytes in the file.

    Raises:
        ValueError: when it is not such a header, or there are gaps between tensors.
    """
    try:
        records = {name: record for name, record in json.loads(header).items() if name != "__metadata__"}
        ordered = sorted(records.items(), key=lambda item: item[1]["data_offsets"])
        dtypes = [str(record["dtype"]) for _, record in ordered]
        shapes = [tuple(map(_as_size, record["shape"])) for _, record in ordered]
        spans = [tuple(map(_as_size, record["data_offsets"])) for _, record in ordered]
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no header of safetensors") from None
    position, entries = 0, []
    for (name, _), dtype, shape, span in zip(ordered, dtypes, shapes, spans, strict=True):
        if len(span) != 2 or span[0] != position or span[1] < position:
            raise ValueError(f"the bytes of {name} do not follow those before them")
        entries.append(HeaderEntry(name, dtype, shape, span[1] - position))
        position = span[1]
    return entries


def _as_size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _check_index(path: Path, files: list[WeightFile]) -> None:
    """Check that every file holds the tensors that the index names in it."""
    contents = {file.name: {entry.name for entry in parse_header(file.header)} for file in files}
    for tensor, name in _read_index(path).items():
        if tensor not in contents[name]:
            raise CheckpointError(
                f"'{path}' names {tensor} in {name}, which does not hold it: fetch or save the model again."
            )


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor."""
    try:
        weight_map: dict[str, str] = dict(json.loads(path.read_text())["weight_map"].items())
        outside = [name for name in weight_map.values() if not is_inside(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{path}' is no index of weight files: fetch or save the model again.") from None
    if outside or not weight_map:
        raise CheckpointError(f"'{path}' names no files of its own directory: fetch or save the model again.")
    return weight_map


def _check_exists(path: Path) -> None:
    try:
        missing = not path.is_file()
    except (OSError, ValueError):  # too long for a path, a NUL byte
        missing = True
    if missing:
        raise CheckpointError(
            f"'{truncate(path)}' is missing, though the index names it: fetch or save the model again."
        )


def _read_header(path: Path) -> str:
    _check_exists(path)
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file has the length it states
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode()
        parse_header(header)
    except (SafetensorError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): fetch or save the model again.") from None
    return header


def read_config(directory: Path) -> Any:
    """Return the content of a checkpoint's config.json; None if there is none.

    Raises:
        CheckpointError: when it is not JSON.
    """
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"'{path}' is not JSON: fetch or save the model again.") from None
