"""Completion in shells: commands, options and words that an option takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alps.cli.main import COMMANDS, app
from alps.solvers.names import METHOD_NAMES


def _complete(line: str) -> list[str]:
    """Return what bash is offered for the last word of a line, which may be empty."""
    position = len(line.split(" ")) - 1
    variables = {"_ALPS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(position)}
    done = CliRunner().invoke(app, env=variables, prog_name="alps")
    assert done.exit_code == 0, done.output
    return done.output.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("alps ", [*COMMANDS]),
        ("alps pr", ["prune"]),
        ("alps prune --re", ["--refit", "--reconstruct-epochs", "--reconstruct-target", "--resume"]),
        ("alps prune model out --no-b", ["--no-bos"]),
        ("alps shrink --mlp", ["--mlp", "--mlp-width"]),
        ("alps prune --method ", [*METHOD_NAMES]),
        ("alps prune --row-weights b", ["block-output"]),
        ("alps shrink --runtime l", ["llama.cpp"]),
        ("alps prune --samples ", []),
    ],
)
def test_commands_options_and_words_are_offered(line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The load of the machine is not measured when a key is pressed.
    monkeypatch.setattr("alps.cli.main.openmp_settings", None)
    assert _complete(line) == offered


def test_completion_is_installed_for_a_shell(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['alps', '--install-completion', 'bash']; from alps.cli.main import run; run()"
    # The shell of this process is named, and not looked for among its parents.
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bash completion installed" in done.stdout
    (installed,) = (tmp_path / ".bash_completions").iterdir()
    assert f"source '{installed}'" in (tmp_path / ".bashrc").read_text()
    assert "_ALPS_COMPLETE=complete_bash" in installed.read_text()
