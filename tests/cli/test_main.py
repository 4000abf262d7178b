"""The list of commands, and the program as a module."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alps
from alps.cli import main as cli
from helpers.cli_process import run_code


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    command = cli.import_command(name)
    assert command.name == name
    assert command.help.splitlines()[0] == cli.COMMANDS[name][2]


@pytest.mark.parametrize(
    ("wanted", "code"), [("--help", 0), ("prune --help", 0), ("compare --help", 0), ("--version", 0), ("prunne", 2)]
)
def test_torch_is_not_waited_for_where_nothing_runs(wanted: str, code: int) -> None:
    script = (
        "import atexit, sys; from alps.cli.main import run\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", script, *wanted.split()], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("set()\n")


def test_versions_are_those_that_a_report_of_a_bug_needs() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    first, second = result.stdout.splitlines()
    assert (result.exit_code, first) == (0, f"alps {alps.__version__}")
    libraries = (f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    assert second.startswith(", ".join(libraries) + f"; Python {platform.python_version()}, ")


def test_as_a_module_in_a_new_process(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('alps', run_name='__main__', alter_sys=True)"
    done = run_code(code, "prune", tmp_path / "nowhere", tmp_path / "out", "--sparsity=0.5")
    assert done.returncode == 2
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr
