"""Reconstruction, distillation and pruning of a model that has lost channels and a block, on a real small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import alps
from alps.core.errors import ConfigError
from alps.finetuning.checkpoint_pair import count_zeros
from alps.reporting.shrink_card import structure_lines
from alps.reporting.shrink_report import ShrinkReport
from helpers.model_comparison import mean_kl


@pytest.fixture(scope="module")
def text(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english)
    return path


@pytest.fixture(scope="module")
def shrunk(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five blocks of the model without the third one, each with 128 of 172 channels."""
    out = tmp_path_factory.mktemp("shrunk") / "small"
    alps.shrink(stories, out, mlp_width=128, drop_blocks=[2], calibration=text, samples=8, seqlen=32)
    return out


def _divergence(stories: Path, folder: Path) -> float:
    dense, other = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (stories, folder))
    ids = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(1))
    return mean_kl(dense, other, ids)


def _sizes(text: Path, samples: int) -> dict[str, Any]:
    return {"calibration": text, "samples": samples, "seqlen": 32}


def test_blocks_are_reconstructed_behind_the_gap(stories: Path, shrunk: Path, text: Path, tmp_path: Path) -> None:
    report = alps.reconstruct(stories, shrunk, tmp_path / "out", epochs=3, lr=5e-4, **_sizes(text, 16))
    assert [record.block for record in report.reconstructions] == [0, 1, 2, 3]
    assert all(record.after <= record.before for record in report.reconstructions)
    assert sum(record.after < record.before for record in report.reconstructions) >= 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 4
    earlier, later = (ShrinkReport.read(folder) for folder in (shrunk, tmp_path / "out"))
    assert earlier is not None and earlier == later
    with pytest.raises(ConfigError, match="lacks whole blocks"):
        alps.reconstruct(stories, shrunk, tmp_path / "other", target=0.5, **_sizes(text, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "shrunk by structured pruning" in card and "**Blocks reconstructed.**" in card
    assert earlier is not None and all(line in card for line in structure_lines(earlier) if line)
    assert "unknown" not in card and "zero" not in card


def test_all_layers_are_distilled(stories: Path, shrunk: Path, text: Path, tmp_path: Path) -> None:
    report = alps.distill(stories, shrunk, tmp_path / "out", steps=6, lr=1e-3, batch_tokens=256, **_sizes(text, 24))
    (record,) = report.distillations
    assert report.is_structured and report.method == "structured pruning"
    assert record.kl_after < record.kl_before
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (shrunk, tmp_path / "out")
    )
    changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in after if "layers" in name or name == "model.norm.weight"}
    assert record.trained_entries == sum(after[name].numel() for name in changed) - record.zeros


def test_zeros_go_on_top_and_the_pair_stays(stories: Path, shrunk: Path, text: Path, tmp_path: Path) -> None:
    report = alps.prune(str(shrunk), sparsity=0.5, method="wanda", out=tmp_path / "sparse", **_sizes(text, 4))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    zeros = count_zeros(sparse)
    assert zeros == report.zeros
    alps.reconstruct(stories, tmp_path / "sparse", tmp_path / "out", lr=3e-3, **_sizes(text, 16))
    assert count_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == zeros
    assert _divergence(stories, tmp_path / "out") < _divergence(stories, tmp_path / "sparse")
