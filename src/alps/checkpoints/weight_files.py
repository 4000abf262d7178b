"""The files of a checkpoint directory: those that hold its weights, and all others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from alps.core.errors import CheckpointError, truncate

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor in a header of safetensors: its dtype in that format's words, its shape, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its name in the directory, where it lies, and its header, spaces at the end included."""

    name: str
    path: Path
    header: str


def find_weights(directory: Path) -> list[WeightFile]:
    """The safetensors files that transformers would load, with headers that were checked against them.

    Raises:
        CheckpointError: when there are none, one is missing or damaged, or the weights are quantized.
    """
    if not directory.is_dir():
        raise CheckpointError(f"'{directory}' is not a directory: give the folder of a checkpoint.")
    _refuse_quantized(directory)
    if (directory / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    elif (directory / INDEX_NAME).is_file():
        names = sorted(set(_indexed(directory / INDEX_NAME).values()))
    else:
        raise CheckpointError(
            f"'{directory}' holds neither {SINGLE_NAME} nor {INDEX_NAME}: save the model with save_pretrained first."
        )
    files = [WeightFile(name, directory / name, _header(directory / name)) for name in names]
    if names != [SINGLE_NAME]:
        _check_index(directory / INDEX_NAME, files)
    return files


def weight_file(path: Path) -> WeightFile:
    """One safetensors file, its header checked against its length.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    return WeightFile(path.name, path, _header(path))


def check_pickles(directory: Path) -> None:
    """Refuse an index of pickled weights that leads out of its directory; their content is not looked at.

    Raises:
        CheckpointError: see above.
    """
    if (directory / _PICKLES_INDEX).is_file():
        _indexed(directory / _PICKLES_INDEX)


def other_files(directory: Path, weights: list[WeightFile]) -> dict[str, Path]:
    """Every other file, by its name from the directory; names that begin with a dot are left out, links are followed.

    Raises:
        CheckpointError: when a link leads to nothing, or to a folder.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() and not path.is_file():
            raise CheckpointError(f"'{path}' is a symbolic link to no file: put the file there, or remove the link.")
        if path.is_file() and name.as_posix() not in {file.name for file in weights}:
            found[name.as_posix()] = path
    return found


def is_inside(name: str) -> bool:
    """Whether a name stays inside the directory that it is put in."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and name == str(path)


def parse_header(header: str) -> list[Entry]:
    """The tensors of a safetensors header in the order of their bytes in the file.

    Raises:
        ValueError: when it is no such header, or its tensors are not one after the other without a gap.
    """
    try:
        records = {name: record for name, record in json.loads(header).items() if name != "__metadata__"}
        ordered = sorted(records.items(), key=lambda item: item[1]["data_offsets"])
        found = [
            (name, str(one["dtype"]), tuple(map(_size, one["shape"])), one["data_offsets"]) for name, one in ordered
        ]
        spans = [tuple(map(_size, offsets)) for *_, offsets in found]
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no header of safetensors") from None
    position, entries = 0, []
    for (name, dtype, shape, _), span in zip(found, spans, strict=True):
        if len(span) != 2 or span[0] != position or span[1] < position:
            raise ValueError(f"the bytes of {name} do not follow those before them")
        entries.append(Entry(name, dtype, shape, span[1] - position))
        position = span[1]
    return entries


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _check_index(path: Path, files: list[WeightFile]) -> None:
    held = {file.name: {entry.name for entry in parse_header(file.header)} for file in files}
    for tensor, name in _indexed(path).items():
        if tensor not in held[name]:
            raise CheckpointError(
                f"'{path}' names {tensor} in {name}, which does not hold it: fetch or save the model again."
            )


def _indexed(path: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        places: dict[str, str] = dict(json.loads(path.read_text())["weight_map"].items())
        wrong = [name for name in places.values() if not is_inside(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{path}' is no index of weight files: fetch or save the model again.") from None
    if wrong or not places:
        raise CheckpointError(f"'{path}' names no files of its own directory: fetch or save the model again.")
    return places


def _header(path: Path) -> str:
    try:
        missing = not path.is_file()
    except OSError:  # too long for a path
        missing = True
    if missing:
        raise CheckpointError(
            f"'{truncate(path)}' is missing, though the index names it: fetch or save the model again."
        )
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file has the length it states
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode()
        parse_header(header)
    except (SafetensorError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): fetch or save the model again.") from None
    return header


def _refuse_quantized(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        config: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"'{path}' is not JSON: fetch or save the model again.") from None
    if isinstance(config, dict) and config.get("quantization_config"):
        raise CheckpointError(f"The weights in '{directory}' are quantized: use the unquantized checkpoint.")
