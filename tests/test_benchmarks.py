"""The scripts behind docs/benchmarks.md run, each on something tiny, and print the rows they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--samples", "2", "--seqlen", "32"]


@pytest.fixture(autouse=True)
def _writes_nothing_into_the_repository() -> object:
    def kept() -> set[Path]:
        return {path for folder in (ROOT / "build", ROOT / "benchmarks") for path in folder.rglob("*.*")}

    before = kept()
    yield
    assert {path for path in kept() - before if "__pycache__" not in path.parts} == set()


def run(folder: Path, script: str, *options: str) -> list[list[str]]:
    """The cells of every line of the tables that a script prints, run in `folder`, which it must leave as it was."""
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == before
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gpu_prints_every_site_and_the_whole_model(tmp_path: Path) -> None:
    sizes = "--shapes 48x64,64x48 --tokens 256 --rate-size 64 --blocks 1 --hidden 512 --samples 2 --seqlen 16"
    rows = run(tmp_path, "gpu.py", "--device", "cpu", *sizes.split())
    assert {"float32", "bfloat16"} <= {row[0] for row in rows if len(row) == 2}
    sites = [row[:2] for row in rows if row[0] in ("48x64", "64x48")]
    assert sites == [[shape, method] for shape in ("48x64", "64x48") for method in ("alps", "sparsegpt")]
    assert all(0 < float(row[5]) < 1 for row in rows if row[0] in ("48x64", "64x48"))
    whole = [row for row in rows if row[0] in ("alps", "sparsegpt")]
    assert [row[0] for row in whole] == ["alps", "sparsegpt"] and all(float(row[6]) > 0 for row in whole)


def test_solver_prints_every_method(tmp_path: Path, stories: Path, english_file: Path) -> None:
    rows = run(
        tmp_path,
        "solver.py",
        *("--model", str(stories), "--calibration", str(english_file), "--blocks", "0,1", "--methods", "alps,wanda"),
        *SMALL,
    )
    assert [row[0] for row in rows] == ["", "---", "alps", "wanda"]
    assert [f"{kind}_proj s" for kind in ("q", "k", "v", "o", "gate", "up", "down")] == rows[0][1:8]
    errors = [float(row[rows[0].index("mean error")]) for row in rows[2:]]
    assert 0 < errors[0] < errors[1] < 1


def test_model_prints_every_method(tmp_path: Path, stories: Path, english_file: Path) -> None:
    rows = run(
        tmp_path,
        "model.py",
        *("--model", str(stories), "--calibration", str(english_file), "--methods", "alps,wanda"),
        *SMALL,
    )
    assert [row[0] for row in rows] == ["method", "---", "alps", "wanda"]
    assert rows[0][1:4] == ["wall s", "of alps", "of wanda"] and float(rows[2][2]) == 1.0
    errors = [float(row[rows[0].index("mean error")]) for row in rows[2:]]
    assert 0 < errors[0] < errors[1] < 1
