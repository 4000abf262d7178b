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


def shrink(text: str, model: Path) -> str:
    """Put a small model and little calibration text into a command or a snippet; nothing else changes."""
    text = text.replace("smollm2-135m", str(model))
    return re.sub(
        r"\b(samples|seqlen)([ =])\d+", lambda size: f"{size[1]}{size[2]}{8 if size[1] == 'samples' else 64}", text
    )


def test_commands_and_python_run_on_a_small_model(tmp_path: Path, short_stories: Path, english: str) -> None:
    (tmp_path / "my-text.txt").write_text(english[:20_000])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # One thread everywhere: bits depend on their number.
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    lines = [line for line in commands() if line.startswith("alps ")]
    named = [
        "prune",
        "inspect",
        "eval",
        "shrink",
        "prune",
        "compare",
        "report",
        "distill",
        "reconstruct",
        "pack",
        "unpack",
        "generate",
    ]
    assert [line.split()[1] for line in lines] == named
    for i, line in enumerate(lines):
        shell = shrink(line, short_stories)
        if i == 0:
            done = subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        else:
            # What the installed command does, without the seconds that it takes to import torch.
            done = started.run(*shlex.split(shell)[1:], cwd=tmp_path, page=True)
        assert done.returncode == 0, (line, done.stderr)
    weights = (tmp_path / "pruned" / "model.safetensors").read_bytes()
    assert (tmp_path / "pruned-again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "unpacked" / "model.safetensors").read_bytes() == weights

    snippets = blocks("python")
    assert len(snippets) == 3
    printed = ""
    for snippet in snippets:
        done = started.run_code(shrink(snippet, short_stories), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert "50.00% zeros" in printed


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    cells = [cell for line in lines if line.startswith("|") for cell in line.split("|")]
    assert len(lines) <= 150
    assert max(len(cell.split()) for cell in cells) <= 30


def test_options_named_in_the_readme_exist() -> None:
    names = ("prune", "eval", "demo", "distill", "reconstruct", "pack")
    helped = "".join(CliRunner().invoke(app, [name, "--help"]).output for name in names)
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in helped.replace("[no-]", ""), option
