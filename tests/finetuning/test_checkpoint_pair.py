"""Pairs of a dense and a pruned model: what makes them one, counts of a foreign checkpoint, and what is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import alps
from alps.core.errors import CheckpointError, ConfigError
from alps.data.loaded_model import LoadedModel, load
from alps.finetuning.checkpoint_pair import (
    check_pair,
    check_request,
    count_zeros,
    describe,
    is_shrunk,
    kept_blocks,
    write_changed,
)
from alps.models.blocks import find_blocks
from alps.models.save import staged_side_files
from alps.models.structure import Target, read_structure
from alps.reporting.run_report import RunReport
from helpers.shrinking import random_kept, shrink

Tiny = Callable[..., Any]


def _pruned(tiny_model: Tiny, pattern: str = "2:4") -> Any:
    model = tiny_model("llama")
    alps.prune(model, pattern=pattern, method="magnitude", measure_error=False)
    return model


def test_a_pair_differs_in_values_alone(tiny_model: Tiny, word_tokenizer: Any) -> None:
    dense, pruned = tiny_model("llama"), _pruned(tiny_model)
    entries = sum(p.numel() for name, p in dense.named_parameters() if "proj" in name)
    assert count_zeros(dense) == 0 and count_zeros(pruned) == entries // 2
    check_pair(LoadedModel("dense", dense, word_tokenizer), LoadedModel("pruned", pruned, word_tokenizer))
    # A tokenizer that one of them lacks proves nothing.
    check_pair(LoadedModel("dense", dense, None), LoadedModel("pruned", pruned, word_tokenizer))


def _refusals(tiny_model: Tiny, words: Any) -> dict[str, tuple[LoadedModel, LoadedModel, str]]:
    dense, pruned = tiny_model("llama"), LoadedModel("pruned", _pruned(tiny_model), words)
    shorter, wide = copy.deepcopy(dense), copy.deepcopy(dense)
    shorter.model.layers = shorter.model.layers[:-1]
    wide.model.layers[2].mlp.up_proj = nn.Linear(32, 8, bias=False)
    vocabulary = copy.deepcopy(shorter)
    vocabulary.resize_token_embeddings(60)
    more = copy.deepcopy(words)
    more.add_tokens(["more"])
    whole = LoadedModel("dense", dense, words)
    return {
        "another class": (LoadedModel("other", tiny_model("gpt2"), None), pruned, "one is a GPT2LMHeadModel"),
        "fewer blocks": (LoadedModel("short", shorter, None), pruned, "only one of them has model.layers.2."),
        "another shape": (
            LoadedModel("wide", wide, None),
            pruned,
            "model.layers.2.mlp.up_proj.weight is (8, 32) in one and (44, 32) in the other",
        ),
        "fewer blocks and tokens": (
            whole,
            LoadedModel("small", vocabulary, None),
            "model.embed_tokens.weight is (64, 32) in one and (60, 32) in the other",
        ),
        "another vocabulary": (LoadedModel("words", dense, more), pruned, "their tokenizers differ in 'more'"),
        "not pruned": (whole, LoadedModel("same", dense, words), "Nothing is pruned in 'same'"),
        "in the wrong order": (pruned, whole, "Nothing is pruned in 'dense'"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "another class",
        "fewer blocks",
        "another shape",
        "fewer blocks and tokens",
        "another vocabulary",
        "not pruned",
        "in the wrong order",
    ],
)
def test_models_that_do_not_belong_together(tiny_model: Tiny, word_tokenizer: Any, case: str) -> None:
    dense, pruned, complaint = _refusals(tiny_model, word_tokenizer)[case]
    with pytest.raises(ConfigError) as refused:
        check_pair(dense, pruned)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def _shrunk(model: Any, target: Target) -> Any:
    structure = read_structure(model, find_blocks(model))
    return shrink(model, target, [random_kept(structure, target, number) for number in range(structure.blocks)])


@pytest.mark.parametrize(
    "target", [Target(mlp_width=40), Target(heads=2, kept_blocks=(0, 2)), Target(kv_heads=1), Target(kept_blocks=(1,))]
)
def test_a_shrunk_model_belongs_to_its_source(tiny_model: Tiny, word_tokenizer: Any, target: Target) -> None:
    dense = tiny_model("llama")
    small = _shrunk(tiny_model("llama"), target)
    assert is_shrunk(dense, small) and not is_shrunk(small, dense) and not is_shrunk(dense, tiny_model("llama"))
    assert not is_shrunk(dense, _pruned(tiny_model)) and not is_shrunk(dense, tiny_model("gpt2"))
    pair = LoadedModel("dense", dense, word_tokenizer), LoadedModel("small", small, word_tokenizer)
    check_pair(*pair)
    with pytest.raises(ConfigError, match="do not belong together"):
        check_pair(*reversed(pair))
    # Zeros on top change nothing of that.
    alps.prune(small, pattern="2:4", method="magnitude", measure_error=False)
    check_pair(*pair)


def test_removed_blocks_are_those_of_the_report(tiny_model: Tiny, tmp_path: Path) -> None:
    dense = tiny_model("llama")
    alps.shrink(dense, tmp_path / "small", drop_blocks=[1], calibration=torch.arange(2, 62).view(4, 15))
    small = load(str(tmp_path / "small")).model
    assert kept_blocks(dense, small, tmp_path / "small") == (0, 2)
    assert kept_blocks(dense, dense, tmp_path) == (0, 1, 2)
    complaint = r"has 2 of 3 blocks, and its shrink\.json does not say which"
    with pytest.raises(ConfigError, match=complaint):
        kept_blocks(dense, small, tmp_path)
    # That of another source, which has other parameters.
    report = json.loads((tmp_path / "small" / "shrink.json").read_text())
    report["before"]["parameters"] -= 1
    (tmp_path / "shrink.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=complaint):
        kept_blocks(dense, small, tmp_path)
    (tmp_path / "shrink.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a report"):
        kept_blocks(dense, small, tmp_path)


@pytest.mark.parametrize(("pattern", "named"), [("2:4", "2:4"), ("3:4", "25%")])
def test_a_foreign_checkpoint_is_described_by_its_zeros(tiny_model: Tiny, pattern: str, named: str) -> None:
    pruned = LoadedModel("pruned", _pruned(tiny_model, pattern), None)
    report = describe(pruned, LoadedModel("dense", tiny_model("llama"), None), "cpu")
    assert (report.model, report.method, report.pattern, report.dtype) == ("dense", "unknown", named, "float32")
    assert report.sparsity == 1 - int(pattern[0]) / 4 and len(report.layers) == 21
    assert all(layer.error is None and layer.sparsity == report.sparsity for layer in report.layers)
    assert {row.reason for row in report.dense} == {"embedding or output head"}


def test_a_changed_model_is_written_whole(tiny_model: Tiny, word_tokenizer: Any, tmp_path: Path) -> None:
    pruned = LoadedModel("pruned", _pruned(tiny_model), word_tokenizer)
    report = describe(pruned, LoadedModel("dense", tiny_model("llama"), None), "cpu")
    with staged_side_files(pruned.writer, tmp_path / "out") as side_files:
        write_changed(pruned, report, tmp_path / "out", side_files)
    assert RunReport.read(tmp_path / "out") == report and (tmp_path / "out" / "README.md").is_file()
    again = load(str(tmp_path / "out"))
    assert all(torch.equal(p, pruned.model.get_parameter(name)) for name, p in again.model.named_parameters())
    with torch.no_grad():
        pruned.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    broken = tmp_path / "broken"
    with pytest.raises(Exception, match="NaN"), staged_side_files(pruned.writer, broken) as side_files:
        write_changed(pruned, report, broken, side_files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_request_is_checked_before_anything_is_loaded(tiny_model: Tiny, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    dense, options = str(tmp_path / "dense"), {"device": "cpu", "dtype": "auto"}
    assert check_request(dense, dense, tmp_path / "out", **options) is None
    for changes, complaint in (
        ({"dtype": "int3"}, "Dtype 'int3' is unknown"),
        ({"device": "quantum"}, "cannot be used here"),
        ({"pruned": str(tmp_path / "nowhere")}, "does not exist"),
        ({"dense": str(tmp_path / "nowhere")}, "does not exist"),
        ({"out": tmp_path / "dense"}, "is not empty"),
    ):
        request: dict[str, Any] = {"dense": dense, "pruned": dense, "out": tmp_path / "out", **options, **changes}
        with pytest.raises((ConfigError, CheckpointError), match=complaint):
            check_request(**request)
    assert not (tmp_path / "out").exists()
