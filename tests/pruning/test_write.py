"""The directory of a pruned model: report, card and settings, and no weight that is not a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import alps
from alps.core.errors import CheckpointError
from alps.core.progress import NoProgress
from alps.pruning import run as running
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.job import prune_checkpoint
from alps.reporting.run_report import RunReport
from helpers.model_comparison import bits, tree


def test_the_report_and_the_card_tell_what_was_done(checkpoint: Path, english_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = alps.prune(
        checkpoint, pattern="2:4", method="wanda", calibration=english_file, samples=4, seqlen=32, seed=9, out=out
    )
    assert RunReport.read(out) == report
    assert (report.architecture, report.method, report.pattern) == ("LlamaForCausalLM", "wanda", "2:4")
    assert report.sparsity == 0.5 and report.entries == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)
    used = report.calibration
    assert used is not None
    assert (used.source, used.windows, used.seqlen, used.tokens, used.seed) == ("english.txt", 4, 32, 128, 9)
    phases = {"load", "capture", "forward", "gram", "prepare", "solve", "measure_error", "save", "total"}
    assert phases <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert {row.name: row.reason for row in report.dense} == {
        "model.embed_tokens.weight": "embedding or output head",
        "lm_head.weight": "embedding or output head",
    }
    card = (out / "README.md").read_text()
    assert f"{report.zeros:,} of {report.entries:,} weights (50.00 %) in 21 linear layers" in card
    assert f"| {report.mean_error:.4f} |" in card and used.sha256[:12] in card
    assert (
        "library_name: transformers" in card.split("---")[1]
        and "quantization_config" not in (out / "config.json").read_text()
    )


def test_settings_are_saved_and_reproduce_the_run(checkpoint: Path, english_file: Path, tmp_path: Path) -> None:
    settings = PruneConfig(
        model=str(checkpoint), sparsity=0.6, calibration=str(english_file), samples=4, seqlen=32, refit=True
    )
    first = prune_checkpoint(settings, tmp_path / "a", NoProgress())
    saved = load_prune_config(tmp_path / "a" / "alps.yaml", {})
    assert saved == settings
    second = prune_checkpoint(saved, tmp_path / "b", NoProgress())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(bits(tensor), bits(two[name])) for name, tensor in one.items())
    assert [r.model_dump(exclude={"solve"}) for r in first.layers] == [
        r.model_dump(exclude={"solve"}) for r in second.layers
    ]


@pytest.mark.parametrize("place", ["lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_no_nan_reaches_a_checkpoint(
    tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever breaks a result after the last site was solved."""
    model, prune_model = tiny_model("llama"), running.prune_model

    def broken(*arguments: Any, **options: Any) -> RunReport:
        report = prune_model(*arguments, **options)
        with torch.no_grad():
            model.get_parameter(place).view(-1)[3] = torch.inf
        return report

    monkeypatch.setattr("alps.pruning.api.prune_model", broken)
    with pytest.raises(
        CheckpointError, match=f"Tensor {place} for '.*out' has become NaN or infinite and is not written"
    ):
        alps.prune(model, sparsity=0.5, method="wanda", calibration=ids, out=tmp_path / "out")
    assert tree(tmp_path) == []
