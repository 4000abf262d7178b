"""The files of a checkpoint directory: those that hold its weights, and all others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from alps.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
        names = _indexed(directory / INDEX_NAME)
    else:
        raise CheckpointError(
            f"'{directory}' holds neither {SINGLE_NAME} nor {INDEX_NAME}: save the model with save_pretrained first."
        )
    return [WeightFile(name, directory / name, _header(directory / name)) for name in names]


def weight_file(path: Path) -> WeightFile:
    """One safetensors file, its header checked against its length.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    return WeightFile(path.name, path, _header(path))


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
        ValueError: when they are not one after the other without a gap.
    """
    records = {name: record for name, record in json.loads(header).items() if name != "__metadata__"}
    position, entries = 0, []
    for name, record in sorted(records.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = record["data_offsets"]
        if begin != position or end < begin:
            raise ValueError(f"the bytes of {name} do not follow those before them")
        entries.append(Entry(name, record["dtype"], tuple(record["shape"]), end - begin))
        position = end
    return entries


def _indexed(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        wrong = [name for name in names if not is_inside(name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"'{path}' is no index of safetensors files: fetch or save the model again.") from None
    if wrong or not names:
        raise CheckpointError(f"'{path}' names no files of its own directory: fetch or save the model again.")
    return names


def _header(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing, though the index names it: fetch or save the model again.")
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file has the length it states
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode()
        parse_header(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): fetch or save the model again.") from None
    return header


def _refuse_quantized(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        config: Any = json.loads(path.read_text())
    except ValueError:
        raise CheckpointError(f"'{path}' is not JSON: fetch or save the model again.") from None
    if isinstance(config, dict) and config.get("quantization_config"):
        raise CheckpointError(f"The weights in '{directory}' are quantized: pack the unquantized checkpoint.")
