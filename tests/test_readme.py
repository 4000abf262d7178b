"""Every command of the README runs unchanged on a small model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from alps.cli.main import app
from helpers import cli_process as started

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INSTALLS = [
    'pip install -c constraints.txt -e ".[demo]" && alps demo',
    'pip install -c constraints.txt -e ".[test]" && pytest',
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.strip().splitlines()]


def test_the_two_commands_are_there_and_ci_runs_the_second() -> None:
    assert [line for line in commands() if line.startswith("pip")] == INSTALLS
    assert INSTALLS[1] in (ROOT / ".ci" / "run").read_text()


def shrink(text: str) -> str:
    """Put the directory `model` and little text into a command or a snippet; nothing else changes."""
    text = text.replace("smollm2-135m", "model")
    small = {"samples": 8, "seqlen": 64, "windows": 8}
    return re.sub(rf"\b({'|'.join(small)})([ =])\d+", lambda size: f"{size[1]}{size[2]}{small[size[1]]}", text)


def without_figures(text: str) -> list[str]:
    """Return the lines of an output with every number replaced, and without what depends on widths."""
    text = re.sub(r"[━─ ]+", " ", text)
    return [re.sub(r"\d[\d,.]*", "#", line).strip() for line in text.splitlines() if line.strip()]


def test_commands_and_python_run_on_a_small_model(tmp_path: Path, short_stories: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # One thread everywhere: bits depend on their number.
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    lines = [line for line in commands() if line.startswith("alps ")]
    assert [line.split()[1] for line in lines] == ["prune", "eval", "pack", "generate", "shrink"]
    (tmp_path / "model").symlink_to(short_stories)
    printed = ""
    for i, line in enumerate(lines):
        shell = shrink(line)
        if i == 0:
            done = subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        else:
            # What the installed command does, without the seconds that it takes to import torch.
            done = started.run(*shlex.split(shell)[1:], cwd=tmp_path, page=True, environment=environment)
        assert done.returncode == 0, (line, done.stderr)
        printed += done.stdout + done.stderr

    # What the README shows is printed, but for the numbers.
    shown = [line for block in blocks("text") for line in without_figures(shrink(block))]
    found = without_figures(printed)
    assert [line for line in shown if line not in found] == []
    assert len(shown) >= 8

    snippets = blocks("python")
    assert len(snippets) == 1
    done = started.run_code(shrink(snippets[0]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "50.00% zeros" in done.stdout


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    cells = [cell for line in lines if line.startswith("|") for cell in line.split("|")]
    assert len(lines) <= 150
    assert max(len(cell.split()) for cell in cells) <= 30


def test_options_named_in_the_readme_exist() -> None:
    names = ("prune", "shrink", "eval", "demo", "compare", "pack", "generate")
    helped = "".join(CliRunner().invoke(app, [name, "--help"]).output for name in names)
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in helped.replace("[no-]", ""), option
