"""Files of a checkpoint: its weight files and their headers, checked, and all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alps.checkpoints.weight_files import (
    check_pickle_index,
    find_other_files,
    find_weight_files,
    is_inside,
    parse_header,
    read_weight_file,
)
from alps.core.errors import CheckpointError
from helpers.packing import small


def _index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *((name, True) for name in ("a", "a/b.safetensors", ".a", "a..b")),
        *((name, False) for name in ("", "/a", "../a", "a/../../b", "a//b", "./a", "a/")),
    ],
)
def test_names_that_lead_out_of_a_directory(name: str, inside: bool) -> None:
    assert is_inside(name) == inside


def test_a_header_is_read_in_the_order_of_the_bytes() -> None:
    entries = parse_header(
        '{"z": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"},'
        ' "c": {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]},'
        ' "a": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}}   '
    )
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in entries] == [
        ("z", "BF16", (2, 3), 12), ("a", "F32", (), 4), ("c", "F32", (0,), 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "spans",
    [[[0, 4], [5, 9]], [[0, 4], [3, 7]], [[1, 4]], [[0, 4, 8]], [[4, 0]], [[0, 4.5]], [[-4, 0]], [[0, True]], 3],
    ids=str,
)
def test_bytes_with_gaps_or_overlaps_are_refused(spans: list[list[int]] | int) -> None:
    spans = [spans] if isinstance(spans, int) else spans  # type: ignore[list-item]
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": span} for i, span in enumerate(spans)}
    with pytest.raises(ValueError):
        parse_header(json.dumps(header))


def test_shards_are_those_of_the_index_and_one_file_goes_before_it(tmp_path: Path) -> None:
    for name, tensors in {"one": ("a", "b"), "two": ("c",), "three": ("d",)}.items():
        save_file({tensor: torch.ones(2) for tensor in tensors}, tmp_path / f"{name}.safetensors")
    _index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors", "b": "one.safetensors"})
    files = find_weight_files(tmp_path)
    assert [file.name for file in files] == ["one.safetensors", "two.safetensors"]
    assert [entry.name for entry in parse_header(files[0].header)] == ["a", "b"]
    assert [*find_other_files(tmp_path, files)] == ["model.safetensors.index.json", "three.safetensors"]
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [file.name for file in find_weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"a": "one.safetensors", "x": "one.safetensors"}, "names x in one.safetensors, which does not hold it"),
        ({"a": "four.safetensors"}, "four.safetensors' is missing, though the index names it"),
        ({"a": "../one.safetensors"}, "names no files of its own directory"),
        ({}, "names no files of its own directory"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, weight_map: dict[str, str], complaint: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    _index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=complaint):
        find_weight_files(tmp_path)


def test_pickles_outside_the_directory_are_refused_unread(tmp_path: Path) -> None:
    check_pickle_index(tmp_path)
    for name in ("absent.bin", "a\0b", "a" * 5000):
        _index(tmp_path, {"a": name}, "pytorch_model.bin.index.json")
        with pytest.raises(CheckpointError, match="is missing, though the index names it"):
            check_pickle_index(tmp_path)
    (tmp_path / "present.bin").write_text("")
    _index(tmp_path, {"a": "present.bin"}, "pytorch_model.bin.index.json")
    check_pickle_index(tmp_path)
    _index(tmp_path, {"a": "/absent.bin"}, "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match="names no files of its own directory"):
        check_pickle_index(tmp_path)


def test_a_quantized_or_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "in")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(CheckpointError, match=r"are quantized \(fp8\): use the unquantized checkpoint"):
        find_weight_files(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        find_weight_files(folder)
    (folder / "config.json").unlink()
    weights = folder / "model.safetensors"
    assert [entry.name for entry in parse_header(read_weight_file(weights).header)] == ["a", "b", "c"]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read"):
        find_weight_files(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        find_weight_files(folder)


def test_other_files_are_listed_without_hidden_ones(tmp_path: Path) -> None:
    folder = small(tmp_path / "in")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").touch()
    (folder / "link").symlink_to(folder / "config.json")
    others = find_other_files(folder, find_weight_files(folder))
    assert list(others) == ["config.json", "link", "sub/a.txt"] and others["sub/a.txt"] == folder / "sub" / "a.txt"
    (folder / "broken").symlink_to(folder / "nowhere")
    with pytest.raises(CheckpointError, match="broken' is a symbolic link to no file"):
        find_other_files(folder, find_weight_files(folder))
