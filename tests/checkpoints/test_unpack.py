"""Unpacking: damage anywhere is refused, and nothing is half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alps.checkpoints.pack import pack_directory
from alps.checkpoints.unpack import unpack_directory
from alps.core.errors import CheckpointError
from helpers.packing import contents, flip, resigned, small


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_one_changed_byte_anywhere_is_refused(tmp_path: Path, compress: bool) -> None:
    pack_directory(small(tmp_path / "in"), tmp_path / "packed", compress)
    made = {"README.md", "config.json", "alps.safetensors", "alps_packed.py"}
    names = {path.name for path in (tmp_path / "packed").iterdir()} - made
    assert names == {"config.original.json", "packed.json", "packed.safetensors"}
    for name in sorted(names):
        path = tmp_path / "packed" / name
        whole = path.read_bytes()
        for position in {0, 9, *range(20, len(whole), len(whole) // 20 + 1), len(whole) - 1}:
            flip(path, position)
            with pytest.raises(CheckpointError) as refused:
                unpack_directory(tmp_path / "packed", tmp_path / "back")
            assert name in str(refused.value) or "install a newer" in str(refused.value)
            assert not (tmp_path / "back").exists()
            flip(path, position)
        assert path.read_bytes() == whole
    unpack_directory(tmp_path / "packed", tmp_path / "back")


@pytest.mark.parametrize("part", ["mask", "values", "offsets", "b"])
def test_a_shard_with_a_hash_that_fits_is_not_believed(tmp_path: Path, part: str) -> None:
    pack_directory(small(tmp_path / "in"), tmp_path / "packed")
    path = tmp_path / "packed" / "packed.safetensors"
    tensors = load_file(path)
    name = part if part == "b" else f"a.{part}"
    tensors[name].view(torch.uint8).view(-1)[5] ^= 1
    save_file(tensors, path)
    resigned(tmp_path / "packed", lambda fields: None)
    with pytest.raises(CheckpointError, match=r"^Tensor [ab] (differs from what was packed|cannot be unpacked)"):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kept": 153}, "a zstd frame of it has another size"),
        ({"itemsize": 2}, "Tensor a differs from what was packed"),
    ],
)
def test_a_compressed_tensor_of_another_size_is_refused(tmp_path: Path, change: dict[str, int], complaint: str) -> None:
    pack_directory(small(tmp_path / "in"), tmp_path / "packed", compress=True)
    resigned(tmp_path / "packed", lambda fields: fields["tensors"]["a"].update(change))
    with pytest.raises(CheckpointError, match=complaint):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_files_that_were_added_later_are_copied(tmp_path: Path) -> None:
    source = small(tmp_path / "in")
    pack_directory(source, tmp_path / "packed")
    (tmp_path / "packed" / "templates").mkdir()
    added = {"tokenizer.json": "{}", "templates/tools.jinja": "{{ tools }}"}
    for name, text in {**added, "model.safetensors": "of something else", ".hidden": ""}.items():
        (tmp_path / "packed" / name).write_text(text)
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == {**contents(source), **{name: text.encode() for name, text in added.items()}}


def test_what_is_cut_short_or_missing_is_named(tmp_path: Path) -> None:
    pack_directory(small(tmp_path / "in"), tmp_path / "packed")
    path = tmp_path / "packed" / "packed.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    message = rf"packed.safetensors' has {len(data) - 100:,} bytes instead of {len(data):,}: fetch"
    with pytest.raises(CheckpointError, match=message):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"packed.safetensors' is missing"):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
    (tmp_path / "packed" / "packed.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a packed directory: it has no packed.json"):
        unpack_directory(tmp_path / "packed", tmp_path / "back")
