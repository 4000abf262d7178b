"""Help as a user sees it: every option with its default, panels in order, nothing cut off, nothing heavy imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from alps.cli.main import COMMANDS, app, import_command
from alps.core.settings import PANELS, describe_fields
from alps.evaluation.compare_config import CompareConfig
from alps.evaluation.evaluate_config import EvaluateConfig
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.pruning.config import PruneConfig
from alps.pruning.shrink_config import ShrinkConfig

_CONFIGS: dict[str, type[BaseModel]] = {
    "prune": PruneConfig,
    "shrink": ShrinkConfig,
    "eval": EvaluateConfig,
    "compare": CompareConfig,
    "distill": DistillConfig,
    "reconstruct": ReconstructConfig,
}
# They take seconds to import, or more than all else that a help text needs.
_HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "matplotlib", "jinja2"}


def _help(width: int, *words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(width)}, prog_name="alps")
    assert done.exit_code == 0, done.output
    assert all(len(line) <= width for line in done.output.splitlines())
    return done.output


def _in_one_line(text: str) -> str:
    return re.sub(r"[│\s]+", " ", text)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", _CONFIGS)
def test_every_setting_is_shown_with_its_default(command: str, width: int) -> None:
    text = _in_one_line(_help(width, command))
    for field in describe_fields(_CONFIGS[command]):
        if field.name == "model":
            continue
        name = f"--[no-]{field.option[2:]}" if field.value_type is bool else f"{field.option} {field.setting.metavar}"
        assert f"{name} {field.help} (default: {field.default})" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_all_parameters_are_shown_with_what_they_do(command: str) -> None:
    text = _in_one_line(_help(80, command))
    assert f"Usage: alps {command} [OPTIONS]" in text and COMMANDS[command][2] in text
    for param in import_command(command).params:
        if param.param_type_name == "argument":
            assert f"{param.metavar} {param.help}" in text and param.metavar.isupper()
            assert not param.required or f"{param.help} (required)" in text
        else:
            assert param.help.split(" (default")[0] in text
            assert param.is_flag or param.metavar is not None, "a value without a name"


@pytest.mark.parametrize("command", _CONFIGS)
def test_panels_are_in_the_order_of_a_persons_questions(command: str) -> None:
    panels = re.findall(r"╭─ ([\w -]+?) ─", _help(80, command))
    assert panels[0] == "Arguments" and panels[-1] == "Options"
    assert panels[1:-1] == [panel for panel in PANELS if panel in panels]
    assert command != "prune" or panels[1:-1] == ["What to prune", "How", "Calibration", "Resources", "Output"]


def test_defaults_that_typer_knows_are_shown() -> None:
    text = _in_one_line(_help(80, "generate"))
    assert "--tokens N Largest number of tokens to generate. (default: 128)" in text
    assert "--prompt TEXT Text to continue. (required)" in text and "--chat Put the prompt" in text
    assert "Directory to create for the pruned model. (default: alps-demo)" in _in_one_line(_help(80, "demo"))


def test_the_list_of_commands_has_a_sentence_on_each() -> None:
    text = _in_one_line(_help(80))
    assert all(f"{name} {sentence}" in text for name, (_, _, sentence) in COMMANDS.items())


_SCRIPT = """
import json, sys
from alps.cli.main import COMMANDS, import_command
for name in COMMANDS:
    import_command(name)
print(json.dumps(sorted({module.partition(".")[0] for module in sys.modules})))
"""


def test_a_help_text_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert _HEAVY & set(json.loads(done.stdout)) == set()


def test_the_load_of_the_machine_is_not_measured_for_a_help_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alps.cli.main.openmp_settings", None)
    assert "Usage: alps prune" in _help(80, "prune")
