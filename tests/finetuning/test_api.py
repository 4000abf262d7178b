"""Distillation and block reconstruction from Python: each on the result of the other, with reports that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alps
from alps.core.errors import ConfigError
from alps.reporting.run_report import RunReport


def test_a_checkpoint_is_reconstructed_and_then_distilled(
    short_stories: Path, english_file: Path, tmp_path: Path
) -> None:
    pruned, first, second = (tmp_path / name for name in ("pruned", "reconstructed", "distilled"))
    alps.prune(short_stories, sparsity=0.6, method="magnitude", measure_error=False, out=pruned)
    sizes: dict[str, Any] = {"calibration": english_file, "samples": 16, "seqlen": 32, "device": "cpu"}
    report = alps.reconstruct(short_stories, str(pruned), first, epochs=1, target=0.5, lr=1e-3, **sizes)
    assert RunReport.read(first) == report and len(report.reconstruction_runs) == 1
    assert report.sparsity == pytest.approx(0.6, abs=1e-4) and report.distillations == []
    report = alps.distill(str(short_stories), first, str(second), steps=2, lr=1e-3, batch_tokens=64, **sizes)
    assert RunReport.read(second) == report and len(report.distillations) == 1
    assert report.distillations[0].steps == 2 and len(report.reconstruction_runs) == 1
    assert alps.inspect(second).sparsity == pytest.approx(0.6, abs=1e-4)


def test_wrong_settings_are_named_as_arguments(short_stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Setting 'lr' in the arguments is wrong"):
        alps.reconstruct(short_stories, short_stories, tmp_path / "out", lr=-1.0)
    with pytest.raises(ConfigError, match="either --minutes"):
        alps.distill(short_stories, short_stories, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
