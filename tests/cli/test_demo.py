"""The demo: on the real 135M-parameter model, as a new user runs it, and what it must not replace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.command_line import contents, run_alps


def run_demo(folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alps", "demo", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=3000,
        # As many threads as a user's has.
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def column(table: str, heading: int) -> dict[str, float]:
    rows = [re.split(r"\s*[│┃]\s*", line)[1:] for line in table.splitlines() if "│" in line]
    return {row[0]: float(row[heading].split()[0]) for row in rows if row[heading].strip()}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_compares_the_methods_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    printed = run_demo(tmp_path)
    perplexity = column(printed, 1)
    assert list(perplexity) == ["dense", "magnitude", "wanda", "sparsegpt", "alps"]
    assert perplexity["dense"] < perplexity["alps"] < perplexity["sparsegpt"] < perplexity["wanda"]
    assert perplexity["alps"] < 0.8 * perplexity["sparsegpt"]
    error = column(printed, 2)
    assert error["alps"] < error["sparsegpt"] < error["wanda"]
    assert set(column(printed, 3).values()) == {70.0}

    report = json.loads((tmp_path / "alps-demo" / "report.json").read_text())
    assert report["summary"]["sparsity"] == pytest.approx(0.7, abs=1e-5)
    assert len(report["layers"]) == 210
    assert all(site["error"] < site["magnitude_error"] for site in report["layers"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alps-demo")
    weight = model.model.layers[7].mlp.down_proj.weight
    assert weight.dtype is torch.bfloat16
    assert int((weight == 0).sum()) >= round(0.7 * weight.numel())

    again = run_demo(tmp_path, "--quick")
    assert list(column(again, 1)) == ["dense", "alps"]
    assert column(again, 1) == {name: perplexity[name] for name in ("dense", "alps")}


def test_the_demo_replaces_nothing_but_an_earlier_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    before = contents(tmp_path)
    assert run_alps(monkeypatch, "demo", tmp_path / "mine") == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == before
