"""Files other than weights: what is copied with a checkpoint, and what is left where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from alps.checkpoints import side_files
from alps.checkpoints.side_files import copy_side_files, find_side_files
from alps.core.errors import CheckpointError
from helpers.log_messages import log_messages
from helpers.model_comparison import tree

_COPIED = (
    *("config.json", "generation_config.json", "LICENSE", "NOTICE", "USE_POLICY.md", ".gitattributes"),
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling_own.py", "code/layers.py"),
    *("preprocessor_config.json", "qwen.tiktoken", "figures/plot.png"),
)
_LEFT = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("consolidated.00.pth", "model.gguf", "flax_model.msgpack", "tf_model.h5", "optimizer.pt", "training_args.bin"),
    *("original/consolidated.00.pth", "original/params.json", "checkpoint-5/config.json", "checkpoint-5/a/model.bin"),
    *("onnx/config.json", "onnx/model.onnx", ".git/config", ".cache/x", "README.md", "report.json", "report.html"),
    *("alps.yaml", "out.partial/journal.json", "out.partial/block-00000.json", "venv/pyvenv.cfg", "venv/a.py"),
)


def test_everything_but_weights_and_other_outputs_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source, folder = tmp_path / "model", tmp_path / "out"
    for number, name in enumerate((*_COPIED, *_LEFT)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes([number, 0, 13, 10, 255]))
    folder.mkdir()
    assert sorted(copy_side_files(source, folder)) == sorted(_COPIED)
    assert [name for name in tree(folder) if (folder / name).is_file()] == sorted(_COPIED)
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in _COPIED)


def test_links_are_followed_and_lead_somewhere(tmp_path: Path) -> None:
    source = tmp_path / "snapshot"
    source.mkdir()
    (tmp_path / "blob").write_text("{}")
    (source / "config.json").symlink_to(tmp_path / "blob")
    (source / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "out").mkdir()
    assert copy_side_files(source, tmp_path / "out") == ["config.json"]
    assert not (tmp_path / "out" / "config.json").is_symlink()
    (source / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model' is a symbolic link to no file"):
        find_side_files(source)


def test_data_among_the_files_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "_LARGEST", 10)
    (tmp_path / "train.jsonl").write_bytes(b"0" * 11)
    (tmp_path / "vocab.txt").write_bytes(b"0" * 10)
    with log_messages() as messages:
        assert list(find_side_files(tmp_path)) == ["vocab.txt"]
    assert len(messages) == 1 and "train.jsonl' is not copied" in messages[0]
