"""Directories that are no checkpoints; the table of faults has one of each kind, and here is what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alps.checkpoints.layout import check_json_files, check_layout, check_weight_layout, is_lfs_pointer
from alps.core.errors import CheckpointError

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def _folder(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors",),
        ("model.safetensors.index.json",),
        ("pytorch_model.bin",),
        ("pytorch_model.bin.index.json",),
        ("model.safetensors", "model.onnx", "tf_model.h5", "m.gguf", "params.json"),
    ],
)
def test_weights_of_transformers_are_accepted_whatever_lies_beside(names: tuple[str, ...], tmp_path: Path) -> None:
    check_layout(_folder(tmp_path, "config.json", *names))
    check_weight_layout(tmp_path)


def test_pointers_of_unused_files_are_no_fault(tmp_path: Path) -> None:
    _folder(tmp_path, "config.json", "model.safetensors")
    for name in ("pytorch_model.bin", "model.onnx", "image.png"):
        (tmp_path / name).write_text(_POINTER)
    check_layout(tmp_path)
    check_weight_layout(tmp_path)
    assert is_lfs_pointer(tmp_path / "image.png") and not is_lfs_pointer(tmp_path / "config.json")
    assert not is_lfs_pointer(tmp_path) and not is_lfs_pointer(tmp_path / "nothing")


@pytest.mark.parametrize(
    "index",
    [
        *("", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "x"}}'),
        *(json.dumps({"weight_map": {"a": name}}) for name in ("a\0b", "a" * 5000, "../../x", "/etc/passwd")),
    ],
)
def test_a_broken_index_is_left_to_its_reader(index: str, tmp_path: Path) -> None:
    _folder(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    check_weight_layout(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 5000])
def test_side_files_are_objects(content: str, tmp_path: Path) -> None:
    _folder(tmp_path, "config.json", "tokenizer.json")
    check_json_files(tmp_path)
    check_json_files(tmp_path / "owner" / "model")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json' is no JSON object"):
        check_json_files(tmp_path)


def test_many_files_are_not_all_listed(tmp_path: Path) -> None:
    _folder(tmp_path, "config.json", *(f"m-{number}.gguf" for number in range(7)))
    with pytest.raises(CheckpointError, match=r"\(m-0.gguf, .*, m-4.gguf and 2 more\)"):
        check_layout(tmp_path)


def test_an_adapter_of_an_unknown_base_is_still_an_adapter(tmp_path: Path) -> None:
    for content in ("{", json.dumps({"peft_type": None})):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError, match="is a PEFT adapter of the base model 'of an unknown name'"):
            check_layout(tmp_path)
