"""Options made from the fields of configs: one set of names on the command line, in YAML and in Python."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import alps
from alps.cli.main import import_command
from alps.cli.options import config_options
from alps.cli.settings_page import settings_page
from alps.core.settings import HOW, Setting, describe_fields, load_config
from alps.evaluation.compare_config import CompareConfig
from alps.evaluation.evaluate_config import EvaluateConfig
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.pruning.config import PruneConfig
from alps.pruning.shrink_config import ShrinkConfig

# What a command or a function takes beside the settings.
_COMMAND = {"out", "dense", "pruned", "config", "dry_run", "resume"}
_PYTHON = {"out", "dense", "pruned", "progress", "tokenizer", "resume"}
_CASES: dict[str, tuple[type[BaseModel], Callable[[], Callable[..., Any]]]] = {
    "prune": (PruneConfig, lambda: alps.prune),
    "shrink": (ShrinkConfig, lambda: alps.shrink),
    "compare": (CompareConfig, lambda: alps.compare),
    "reconstruct": (ReconstructConfig, lambda: alps.reconstruct),
    "distill": (DistillConfig, lambda: alps.distill),
}


@pytest.mark.parametrize("name", _CASES)
def test_command_python_and_yaml_have_the_same_settings(name: str) -> None:
    config, function = _CASES[name]
    settings = set(config.model_fields)
    assert {parameter.name for parameter in import_command(name).params} - _COMMAND - {"help"} == settings
    assert set(inspect.signature(function()).parameters) - _PYTHON == settings


def test_evaluate_and_evaluate_tasks_have_the_settings_of_eval() -> None:
    settings = set(EvaluateConfig.model_fields)
    assert {parameter.name for parameter in import_command("eval").params} - {"help"} == settings
    functions = (alps.evaluate, alps.evaluate_tasks)
    parameters = {name for function in functions for name in inspect.signature(function).parameters}
    assert parameters - {"progress", "group"} == settings


@pytest.mark.parametrize("name", _CASES)
def test_defaults_in_python_are_those_of_the_config(name: str) -> None:
    config, function = _CASES[name]
    parameters = inspect.signature(function()).parameters
    for field in describe_fields(config):
        info = config.model_fields[field.name]
        given = parameters[field.name].default
        if field.setting.default == "by preset" or info.is_required():
            assert given in (None, inspect.Parameter.empty)
        else:
            empty = given in (None, ())
            assert (list(given or []) if isinstance(info.default, list) else given) == info.default or (
                empty and not info.default
            ), field.name


@pytest.mark.parametrize("name", _CASES)
def test_options_are_the_names_with_dashes_and_say_their_default(name: str) -> None:
    config, _ = _CASES[name]
    options: dict[str, Any] = {parameter.name: parameter for parameter in import_command(name).params}
    for field in describe_fields(config):
        if field.name == "model":
            continue
        option = options[field.name]
        assert option.opts == [f"--{(field.setting.flag or field.name).replace('_', '-')}"]
        switch = config.model_fields[field.name].annotation is bool
        assert option.secondary_opts == ([f"--no-{field.name.replace('_', '-')}"] if switch else [])
        assert option.default is None
        assert option.help.endswith(f"(default: {field.default})")


def test_the_page_of_settings_is_that_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
    assert page.read_text() == settings_page(), "run python -m alps.cli.settings_page > docs/reference/settings.md"


@pytest.mark.parametrize(
    "config", [EvaluateConfig, *(config for config, _ in _CASES.values())], ids=lambda config: config.__name__
)
def test_every_setting_is_described_in_a_sentence(config: type[BaseModel]) -> None:
    for field in describe_fields(config):
        assert field.help[0].isupper() and field.help.endswith("."), field.name
        assert field.setting.panel != "Options", field.name


def test_overrides_and_options_can_be_written_as_text() -> None:
    values = {"model": "m", "sparsity": 0.5, "overrides": "*.k_proj=0.6, model.layers.1.*=2:4"}
    config = PruneConfig.model_validate({**values, "options": "{damping: 0.02, admm: {rho: 0.3}}"})
    assert config.overrides == {"*.k_proj": 0.6, "model.layers.1.*": "2:4"}
    assert config.options == {"damping": 0.02, "admm": {"rho": 0.3}}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"overrides": "0.5"}, "Override '0.5' names no layers: write NAME=PATTERN"),
        ({"options": "0.5"}, "Setting 'options' is wrong: write a YAML mapping"),
        ({"options": "{a"}, "The value in 'options={a' is not valid YAML"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(alps.AlpsError) as caught:
        PruneConfig.model_validate({"model": "m", "sparsity": 0.5, **values})
    assert complaint in str(caught.value)


class _Extended(PruneConfig):
    """The settings with one more."""

    sharpness: Annotated[float | None, Setting(HOW, "SHARE")] = Field(default=0.5, description="A new option.")


def test_a_new_field_is_an_option_a_yaml_key_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []

    @config_options(_Extended)
    def command(model: Annotated[str, typer.Argument()], values: dict[str, Any]) -> None:
        received.append({"model": model, **values})

    single = typer.Typer()
    single.command()(command)
    done = CliRunner().invoke(single, ["m", "--sharpness", "0.25", "--sparsity", "0.5"])
    assert done.exit_code == 0, done.output
    assert received[0]["sharpness"] == 0.25 and received[0]["samples"] is None
    (tmp_path / "run.yaml").write_text("sharpness: 0.75\nsamples: 3\n")
    config = load_config(_Extended, tmp_path / "run.yaml", {**received[0], "sharpness": None})
    assert (config.sharpness, config.samples) == (0.75, 3)
    assert config.fingerprint_fields()["sharpness"] == "0.75"
    assert "(default: 0.5)" in CliRunner().invoke(single, ["--help"], env={"COLUMNS": "200"}).output


def _declares(tree: ast.AST, name: str) -> bool:
    """Find the name as a parameter, an annotated field, a keyword argument or the key of a dictionary."""
    return any(
        (isinstance(node, ast.arg | ast.keyword) and node.arg == name)
        or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name)
        or (isinstance(node, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == name for k in node.keys))
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("name", ["keep_zeros", "dense_target", "reconstruct_epochs", "effort", "activation_memory"])
def test_an_option_is_declared_in_at_most_four_files(name: str) -> None:
    source = Path(alps.__file__).parent
    files = {path.name for path in source.rglob("*.py") if _declares(ast.parse(path.read_text()), name)}
    # The table of the methods knows their option; structured pruning has settings of its own.
    shrink = {"shrink_config.py", "shrink_api.py"}
    configs = {"config.py", "calibrated_config.py"}
    assert files - {"__init__.py", "registry.py"} - shrink - configs <= {"recipe.py", "presets.py", "api.py"}
    assert len(files & configs) == 1 and "api.py" in files
