"""Every fault of the table: one sentence, exit code 2, no traceback, nothing written; the page has them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.scene import Scene, arguments, attempt
from faults.table import FAULTS, Fault, meet

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}, {fault.command}")
def test_a_fault_is_one_sentence_and_nothing_is_written(fault: Fault, tmp_path: Path, stories: Path) -> None:
    found = meet(fault, tmp_path, stories)
    assert found.code == 2, found
    assert found.printed == "" and "Traceback" not in found.told
    assert found.sentence.startswith("Error: ") and found.sentence.endswith(".") and fault.words in found.sentence
    assert len([line for line in found.told.splitlines() if line.startswith("Error: ")]) == 1
    if fault.early:
        assert found.told == found.sentence + "\n"
    assert not found.changed, "nothing may be written, left or run"
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["weights cut short in their data", "NaN in the embedding", "zero samples"])
def test_a_new_process_says_the_same(name: str, tmp_path: Path, stories: Path) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    scene = Scene(tmp_path, stories)
    words = arguments(scene, fault.command, *(fault.lay(scene) or []))
    before = scene.contents()
    done = subprocess.run([sys.executable, "-m", "alps", *words], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and done.stdout == "" and fault.words in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert scene.contents() == before


def test_without_a_fault_the_run_comes_through(tmp_path: Path, stories: Path) -> None:
    scene = Scene(tmp_path, stories)
    assert attempt(scene, arguments(scene, "prune")).code == 0
    assert scene.out.is_dir()


def test_the_page_tells_of_every_fault() -> None:
    lines = PAGE.read_text().split("## Bad inputs")[1].split("```")[0].splitlines()
    rows = [line.replace("\\|", "/").strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [fault.name for fault in FAULTS]
    for row, fault in zip(rows, FAULTS, strict=True):
        assert fault.words in row[1] and row[2] == "nothing"
