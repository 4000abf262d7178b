"""`alps.shrink`: a model in memory gives the bits of its directory and stays as it is; token ids in place of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps
from alps.core.errors import CheckpointError, ConfigError
from alps.reporting.shrink_report import ShrinkReport
from helpers.model_comparison import same, weights
from helpers.shrink_runs import comparable, weight_bytes

Tiny = Callable[..., Any]
_CUTS: dict[str, Any] = {"mlp_width": 32, "num_heads": 2, "drop_blocks": [1]}


@pytest.fixture
def many() -> Tensor:
    return torch.randint(2, 60, (9, 16), generator=torch.Generator().manual_seed(6))


def test_a_model_in_memory_gives_the_bits_of_its_directory(
    tiny_model: Tiny, word_tokenizer: Any, many: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama").train()
    model.save_pretrained(tmp_path / "dense")
    word_tokenizer.save_pretrained(tmp_path / "dense")
    before, config = copy.deepcopy(weights(model)), model.config.to_dict()
    options: dict[str, Any] = {**_CUTS, "calibration": many, "reconstruct_epochs": 1}
    named = alps.shrink(tmp_path / "dense", tmp_path / "named", **options)
    report = alps.shrink(model, tmp_path / "out", tokenizer=word_tokenizer, **options)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "named")
    assert same(before, weights(model)) and model.training and model.config.to_dict() == config
    one, other = (comparable(each) for each in (named, report))
    assert one.pop("model") == str(tmp_path / "dense") and other.pop("model") == "LlamaForCausalLM"
    assert one == other and report.calibration.seed is None
    # transformers has written it: there is no directory to copy files from.
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and written.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("once").input_ids == word_tokenizer("once").input_ids
    # Neither token ids nor a model in memory can be written as settings.
    for name in ("named", "out"):
        assert not (tmp_path / name / "alps.yaml").exists()
        card = (tmp_path / name / "README.md").read_text()
        assert "alps.yaml" not in card and "seed" not in card
    assert ShrinkReport.read(tmp_path / "out") == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "named", "out"]


def test_a_text_needs_a_tokenizer(tiny_model: Tiny, english_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        alps.shrink(tiny_model("llama"), tmp_path / "out", **_CUTS, calibration=english_file, samples=4, seqlen=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bos": True}, "put the BOS token into the token ids"),
        ({"calibration": torch.zeros(3, dtype=torch.int64)}, "windows"),
        ({"calibration": torch.full((2, 8), 99)}, "99"),
        ({"mlp_width": 99}, "99 MLP channels cannot be kept of 44"),
        ({"mlp": "much"}, "mlp"),
        ({"drop_blocks": [0, 1, 2]}, "cannot be kept"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    tiny_model: Tiny, many: Tensor, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=complaint):
        alps.shrink(model, tmp_path / "out", **{"num_heads": 2, "calibration": many, **options})
    assert list(tmp_path.iterdir()) == [] and same(weights(model), weights(tiny_model("llama")))


def test_what_is_no_model_is_refused(many: Tensor, tmp_path: Path) -> None:
    unknown: Any = 3
    with pytest.raises(ConfigError, match="A int cannot be shrunk"):
        alps.shrink(unknown, tmp_path / "out", mlp=0.5, calibration=many)


def test_weights_that_are_not_finite_are_refused(tiny_model: Tiny, many: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        alps.shrink(model, tmp_path / "out", mlp_width=32, calibration=many)
    assert list(tmp_path.iterdir()) == []
