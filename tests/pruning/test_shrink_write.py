"""The directory of a smaller model: files of the source are kept, config.json is edited, nothing is half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alps
from alps.core.errors import CheckpointError
from alps.data.loaded_model import LoadedModel, open_model
from alps.models.shrunk_model import check_target, empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel
from alps.models.structure import Target
from alps.pruning.shrink_write import ShrunkWriter

Tiny = Callable[..., Any]
_TARGET = Target(mlp_width=40, heads=2, kept_blocks=(0, 2))


def _writer(loaded: LoadedModel) -> ShrunkWriter:
    structure = check_target(loaded.model, loaded.blocks(), _TARGET)
    small = ShrunkModel.of(empty_shrunk_model(loaded.model, loaded.blocks(), _TARGET))
    return ShrunkWriter(loaded, small, structure, _TARGET.complete(structure))


@pytest.fixture
def source(tiny_model: Tiny, word_tokenizer: Any, tmp_path: Path) -> Path:
    """A directory with files of its own, one of which belongs to another run."""
    folder = tmp_path / "dense"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("All of it.\n")
    (folder / "report.json").write_text("{}")
    (folder / "README.md").write_text("# Dense\n")
    config = json.loads((folder / "config.json").read_text())
    # Own order, an own field, and a float that json would write otherwise.
    text = json.dumps({"own_field": [1, 2], **config}, indent=4).replace("1e-06", "1.0e-6")
    (folder / "config.json").write_text(text + "\n\n")
    return folder


def test_files_of_the_source_are_kept_and_three_lines_of_config_change(source: Path, tmp_path: Path) -> None:
    writer = _writer(open_model(str(source)))
    (tmp_path / "files").mkdir()
    writer.write_side_files(tmp_path / "files")
    names = {path.name for path in (tmp_path / "files").iterdir()}
    assert names == {"LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    before, after = ((folder / "config.json").read_text() for folder in (source, tmp_path / "files"))
    changed = [
        (one.strip(), other.strip())
        for one, other in zip(before.splitlines(), after.splitlines(), strict=True)
        if one != other
    ]
    assert changed == [
        ('"intermediate_size": 44,', '"intermediate_size": 40,'),
        ('"num_attention_heads": 4,', '"num_attention_heads": 2,'),
        ('"num_hidden_layers": 3,', '"num_hidden_layers": 2,'),
    ]
    assert writer.weight_bytes() == writer.small.nbytes == 4 * writer.small.parameters


def test_a_configuration_in_another_encoding_is_refused(source: Path, tmp_path: Path) -> None:
    writer = _writer(open_model(str(source)))
    (source / "config.json").write_bytes((source / "config.json").read_text().encode("utf-16"))
    (tmp_path / "files").mkdir()
    with pytest.raises(CheckpointError, match="UTF-8"):
        writer.write_side_files(tmp_path / "files")


def test_a_model_without_a_directory_is_written_by_transformers(
    tiny_model: Tiny, word_tokenizer: Any, tmp_path: Path
) -> None:
    _writer(LoadedModel("tiny", tiny_model("llama", torch.bfloat16), word_tokenizer)).write_side_files(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["dtype"]) == (2, 40, "bfloat16")
    assert config["architectures"] == ["LlamaForCausalLM"] and (tmp_path / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_failure_while_weights_are_written_leaves_the_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(2, 62).view(4, 15)
    options: dict[str, Any] = {"mlp_width": 40, "calibration": ids}

    def fail(*_args: Any, **_options: Any) -> None:
        raise CheckpointError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(ShrunkModel, "save", fail)
        with pytest.raises(CheckpointError, match=r"The disk is full\. 3 finished blocks are kept in"):
            alps.shrink(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out.partial"]
    monkeypatch.setattr("alps.pruning.shrink_pipeline._shrink_block", fail)  # no block is shrunk again
    alps.shrink(source, tmp_path / "out", **options, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
