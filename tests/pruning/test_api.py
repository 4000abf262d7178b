"""Pruning from Python: in memory and by directory, what is written, and what failing leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps
from alps.core.errors import CheckpointError, ConfigError
from alps.data.loaded_model import load
from alps.reporting.run_report import RunReport
from alps.solvers.patterns import parse_pattern
from helpers.model_comparison import bits, same_models, tree

_FILES = {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("pattern", [0.6, "2:4"])
def test_a_pruned_directory_is_the_model_pruned_in_memory(
    stories: Path, english_file: Path, tmp_path: Path, dtype: str, pattern: str | float
) -> None:
    settings: dict[str, Any] = {"calibration": english_file, "samples": 6, "seqlen": 48, "seed": 5}
    report = alps.prune(
        stories, pattern=parse_pattern(str(pattern)), method="alps", out=tmp_path / "out", dtype=dtype, **settings
    )
    loaded = load(str(stories), dtype)
    in_memory = alps.prune(
        loaded.model, pattern=parse_pattern(str(pattern)), method="alps", tokenizer=loaded.tokenizer, **settings
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype is (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert same_models(again, loaded.model) and not same_models(again, load(str(stories), dtype).model)
    assert [r.error for r in report.layers] == [r.error for r in in_memory.layers]

    assert set(tree(tmp_path / "out")) >= _FILES and tree(tmp_path) == sorted(
        ["out", *(f"out/{name}" for name in tree(tmp_path / "out"))]
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for record in report.layers:
        weight = stored[f"{record.name}.weight"]
        expected = weight.numel() // 2 if pattern == "2:4" else round(0.6 * weight.numel())
        assert int((bits(weight) == 0).sum()) == int((weight == 0).sum()) == expected == record.zeros
    assert report.zeros == sum(record.zeros for record in report.layers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("once upon a time").input_ids == loaded.tokenizer("once upon a time").input_ids


@pytest.mark.parametrize("content", ["[1]", "{", '"x"', "3", '{"summary": {}}', '{"model": 1}', "\0"])
def test_another_programs_report_is_refused(tmp_path: Path, content: str) -> None:
    assert RunReport.read(tmp_path) is None
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json' is not a report of this program"):
        RunReport.read(tmp_path)


def test_no_calibration_is_needed_where_nothing_is_read(checkpoint: Path, tmp_path: Path) -> None:
    report = alps.prune(checkpoint, sparsity=0.5, method="magnitude", measure_error=False, out=tmp_path / "out")
    assert report.calibration is None and report.mean_error is None and report.sparsity == 0.5
    assert "mean relative reconstruction error" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "name"), [(alps.Wanda, "Wanda"), (lambda weight: weight, "function"), (None, "NoneType")]
)
def test_what_is_no_method_is_refused(stories: Path, tmp_path: Path, method: Any, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"of a subclass of alps\.solvers\.Method, such as alps\.Wanda\(\), not {name}\."
    ):
        alps.prune(stories, sparsity=0.5, method=method, out=tmp_path / "out")
