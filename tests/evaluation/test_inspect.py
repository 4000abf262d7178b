"""Counts of a checkpoint: from its weights alone, with the patterns and reasons of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import alps
from alps.core.errors import CheckpointError
from helpers.decoders import decoder


@pytest.fixture
def pruned(short_stories: Path, tmp_path: Path) -> Path:
    """The first two blocks of the small model at 2:4, with a layer that is dense by a rule."""
    options: dict[str, Any] = {"method": "magnitude", "measure_error": False, "keep_dense": ["*.0.self_attn.o_proj"]}
    alps.prune(short_stories, pattern="2:4", out=tmp_path / "pruned", **options)
    return tmp_path / "pruned"


def _change(folder: Path, layer: str, row: int, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer}.weight"][row, :4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_zeros_and_groups_are_counted_from_the_weights(pruned: Path) -> None:
    inspection = alps.inspect(str(pruned))
    tensors = load_file(pruned / "model.safetensors")
    assert len(inspection.layers) == 14 and inspection.claimed == "2:4"
    for layer in inspection.layers:
        weight = tensors[f"{layer.name}.weight"]
        assert layer.zeros == int((weight == 0).sum()) and layer.shape == tuple(weight.shape)
    total = sum(tensors[f"{layer.name}.weight"].numel() for layer in inspection.layers)
    assert inspection.sparsity == sum(layer.zeros for layer in inspection.layers) / total
    kept = {record.name: (record.reason, record.rule) for record in inspection.dense}
    assert kept["model.layers.0.self_attn.o_proj.weight"] == (
        "kept dense by the rule '*.0.self_attn.o_proj'",
        "*.0.self_attn.o_proj",
    )
    assert kept["model.embed_tokens.weight"] == ("embedding or output head", None) and len(kept) == 2
    (check,) = inspection.checks
    assert (check.pattern, check.violations, check.groups) == ("2:4", 0, (total - 64 * 64) // 4)


def test_a_report_does_not_hide_what_the_weights_are(pruned: Path) -> None:
    _change(pruned, "model.layers.1.mlp.up_proj", 3, 1.0)
    inspection = alps.inspect(pruned)
    assert [check.violations for check in inspection.checks] == [1]
    assert "2:4: 1 of " in str(inspection) and "groups broken" in str(inspection)


def test_without_a_report_the_patterns_that_hold_are_listed(pruned: Path) -> None:
    (pruned / "report.json").unlink()
    # The layer without zeros counts, too, and breaks every pattern.
    assert alps.inspect(pruned).checks == [] and alps.inspect(pruned).claimed is None
    tensors = load_file(pruned / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.where(torch.arange(64) % 4 < 2, weight, 0.0)
    save_file(tensors, pruned / "model.safetensors", {"format": "pt"})
    checks = alps.inspect(pruned).checks
    assert "2:4" in [check.pattern for check in checks] and all(check.violations == 0 for check in checks)


def test_layers_that_no_setting_prunes_do_not_count(tmp_path: Path) -> None:
    """Mamba reads the weight of a layer without calling it."""
    report = alps.prune(decoder("mamba"), pattern="2:4", method="magnitude", out=tmp_path / "out", measure_error=False)
    inspection = alps.inspect(tmp_path / "out")
    counted, pruned = ([(row.name, row.zeros) for row in result.layers] for result in (inspection, report))
    assert counted == pruned
    assert inspection.sparsity == report.sparsity == 0.5
    assert [(check.pattern, check.violations) for check in inspection.checks] == [("2:4", 0)]
    told = {record.name: record.reason for record in inspection.dense}
    assert told["backbone.layers.0.mixer.dt_proj.weight"] == "a forward on text does not call it as a layer"
    assert told == {record.name: record.reason for record in report.dense}


def test_files_and_broken_reports_are_refused(pruned: Path, tmp_path: Path) -> None:
    (pruned / "report.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="is not a report of this program"):
        alps.inspect(pruned)
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.gguf' is not a directory: give the folder of a checkpoint\.$"):
        alps.inspect(tmp_path / "model.gguf")
