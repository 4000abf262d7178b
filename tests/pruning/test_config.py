"""Settings: read from YAML, overridden by flags, refused with a sentence that says what is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from alps.core.errors import ConfigError
from alps.core.settings import describe_fields
from alps.pruning.config import PruneConfig, load_prune_config
from alps.solvers import METHODS, Alps, DSnoT, Magnitude, Refitted, SparseGPT
from alps.solvers.admm import EFFORTS, AdmmSettings
from alps.solvers.patterns import SemiStructured, Unstructured


def _yaml(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _refused(folder: Path, content: str | bytes, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prune_config(_yaml(folder, content), overrides or {})
    return str(caught.value)


def _with_options(method: str, options: dict[str, Any]) -> PruneConfig:
    return PruneConfig(model="m", sparsity=0.5, method=method, options=options)


def test_a_file_is_read(tmp_path: Path) -> None:
    settings = load_prune_config(
        _yaml(tmp_path, "model: a/b\nsparsity: 0.7\nsamples: 16\noffload: true\ncalibration: ünï.txt\n"), {}
    )
    assert (settings.model, settings.sparsity, settings.pattern) == ("a/b", 0.7, None)
    assert (settings.samples, settings.offload, settings.calibration) == (16, True, "ünï.txt")
    assert (settings.method, settings.seqlen, settings.seed, settings.measure_error) == ("alps", 2048, 0, True)


def test_overrides_beat_the_file_and_none_is_no_override(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "model: a/b\nsparsity: 0.7\nsamples: 16\noffload: true\n")
    settings = load_prune_config(path, {"samples": 3, "offload": False, "model": None, "seed": 0})
    assert (settings.samples, settings.offload, settings.model, settings.seed) == (3, False, "a/b", 0)


def test_no_file_is_needed() -> None:
    assert load_prune_config(None, {"model": "m", "pattern": "2:4"}).build_pattern() == SemiStructured(2, 4)


def test_a_target_given_as_a_flag_replaces_the_files(tmp_path: Path) -> None:
    by_sparsity = _yaml(tmp_path, "model: m\nsparsity: 0.7\n")
    assert load_prune_config(by_sparsity, {"pattern": "4:8"}).build_pattern() == SemiStructured(4, 8)
    by_pattern = _yaml(tmp_path, "model: m\npattern: '2:4'\n")
    assert load_prune_config(by_pattern, {"sparsity": 0.25}).build_pattern() == Unstructured(0.25)


@pytest.mark.parametrize("written", ["2:4", "'2:4'", '"2:4"', "4:8", "1:4", "2:40"])
def test_a_pattern_means_what_it_says_with_or_without_quotes(tmp_path: Path, written: str) -> None:
    # YAML 1.1 reads a bare 2:4 as the number 2 * 60 + 4.
    keep, group = (int(number) for number in written.strip("'\"").split(":"))
    settings = load_prune_config(_yaml(tmp_path, f"model: m\npattern: {written}\n"), {})
    assert settings.build_pattern() == SemiStructured(keep, group)


def test_a_whole_number_is_a_sparsity(tmp_path: Path) -> None:
    assert load_prune_config(_yaml(tmp_path, "model: m\nsparsity: 0\n"), {}).build_pattern() == Unstructured(0.0)


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    message = _refused(tmp_path, "model: m\nsampels: 3\n")
    assert "Setting 'sampels' in " in message and "run.yaml is unknown" in message
    assert message.endswith("Did you mean 'samples'?")
    assert "Did you mean" not in _refused(tmp_path, "model: m\nxyzzy: 3\n")
    with pytest.raises(ConfigError, match=r"'sparcity' in the command line is unknown\. Did you mean 'sparsity'"):
        load_prune_config(None, {"model": "m", "sparcity": 0.5})


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    assert "Setting 'model' is missing" in _refused(tmp_path, "sparsity: 0.5\n")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("samples: many", "integer, not 'many'"),
        ("samples: 1.5", "integer, not 1.5"),
        ("samples: true", "integer, not True"),
        ("samples: '16'", "integer, not '16'"),
        ("samples: 0", "greater than or equal to 1, not 0"),
        ("seqlen: 1", "greater than or equal to 2, not 1"),
        ("seed: -1", "greater than or equal to 0, not -1"),
        ("sparsity: half", "number, not 'half'"),
        ("sparsity: '0.5'", "number, not '0.5'"),
        ("sparsity: true", "number, not True"),
        ("sparsity: no", "number, not False"),
        ("offload: 1", "boolean, not 1"),
        ("options: [1]", "dictionary, not [1]"),
        ("calibration: 2020-01-01", "string, not datetime.date"),
        ("model: 3", "string, not 3"),
        ("1: 2", "keys should be strings"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    content = line if line.startswith("model") else f"model: m\n{line}\n"
    message = _refused(tmp_path, content)
    assert f"Setting '{line.partition(':')[0]}' in " in message and complaint in message


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "Give either --sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "Give either --sparsity"),
        ({"sparsity": 1.0}, "outside [0, 1)"),
        ({"sparsity": -0.1}, "outside [0, 1)"),
        ({"sparsity": float("nan")}, "outside [0, 1)"),
        ({"pattern": "0.5"}, "is not N:M"),
        ({"pattern": "4:2"}, "1 <= N < M"),
        ({"pattern": "0:4"}, "1 <= N < M"),
        ({"pattern": "two:four"}, "is not understood"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prune_config(None, {"model": "m", **values}).build_pattern()
    assert complaint in str(caught.value)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_with_its_defaults(name: str, refit: bool) -> None:
    built = PruneConfig(model="m", sparsity=0.5, method=name, refit=refit).build_method()
    assert built == (Refitted(METHODS[name]()) if refit else METHODS[name]())


def test_options_reach_the_method_at_any_depth() -> None:
    options = {"damping": 0.02, "admm": {"rho": 0.3, "max_iterations": 12, "growth": [[0.5, 2.0], [0, 1.1]]}}
    built = _with_options("alps", options).build_method()
    admm = AdmmSettings(rho=0.3, max_iterations=12, growth=((0.5, 2.0), (0.0, 1.1)))
    assert built == Alps(damping=0.02, admm=admm)
    assert built != Alps(damping=0.02)
    assert _with_options("dsnot-sparsegpt", {"max_cycles": 3}).build_method() == DSnoT("sparsegpt", 3)
    refitted = PruneConfig(model="m", sparsity=0.5, method="sparsegpt", options={"damping": 0.1}, refit=True)
    assert refitted.build_method() == Refitted(SparseGPT(damping=0.1))
    assert _with_options("magnitude", {}).build_method() == Magnitude()


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("alps", {"dampling": 0.1}, "Setting 'dampling' is not among the options of method 'alps'"),
        ("alps", {"dampling": 0.1}, "Did you mean 'damping'?"),
        ("alps", {"admm": {"roh": 0.1}}, "Did you mean 'rho'?"),
        ("alps", {"damping": "much"}, "Setting 'damping' of the options of method 'alps' is wrong"),
        ("alps", {"refit_steps": 2.5}, "not 2.5"),
        ("alps", {"admm": {"max_iterations": "ten"}}, "not 'ten'"),
        ("alps", {"admm": 3}, "not 3"),
        ("alps", {"admm": {"growth": [[0.1]]}}, "Setting 'growth'"),
        ("alps", {3: 4}, "string, not 3"),
        ("alps", {"damping": -0.1}, "Setting 'damping' of the options of method 'alps' is wrong: -0.1 is below 0"),
        ("alps", {"damping": float("nan")}, "nan is below 0 or infinite"),
        ("alps", {"admm": {"rho": 0}}, "rho and all factors positive"),
        ("alps", {"admm": {"check_every": 0}}, "check_every must be at least 1"),
        ("alps", {"admm": {"growth": [[0.1, 0.0]]}}, "rho and all factors positive"),
        ("sparsegpt", {"block": 0}, "must be at least 1 column"),
        ("dsnot", {"initial": "random"}, "'wanda' or 'sparsegpt', not 'random'"),
        ("magnitude", {"damping": 0.1}, "it has none"),
        ("wnada", {}, "Method 'wnada' is unknown: choose one of alps, "),
        ("wnada", {}, "Did you mean 'wanda'?"),
    ],
)
def test_wrong_methods_and_options_are_refused(method: str, options: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prune_config(None, {"model": "m", "sparsity": 0.5, "method": method, "options": options}).build_method()
    assert complaint in str(caught.value)


def test_what_is_saved_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    for settings in (
        PruneConfig(model="a/b", sparsity=1e-5, samples=7, refit=True, calibration="é: [x"),
        PruneConfig(model="./m", pattern="2:4", options={"admm": {"growth": [[0.1, 1.3]]}}, measure_error=False),
        PruneConfig(model="no", sparsity=0.3, method="dsnot", seed=2**40, dtype="bfloat16"),
    ):
        text = settings.to_yaml()
        assert load_prune_config(_yaml(tmp_path, text), {}) == settings
        assert list(yaml.safe_load(text)) == [field.name for field in describe_fields(PruneConfig)]
        assert len([line for line in text.splitlines() if not line.startswith(" ")]) >= len(settings.model_fields_set)


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = PruneConfig(model="m", sparsity=0.5)
    with pytest.raises(ValueError, match="frozen"):
        settings.model = "other"


def test_effort_reaches_the_schedule_and_options_go_on_top() -> None:
    high = PruneConfig(model="m", sparsity=0.5, effort="high").build_method()
    assert high == Alps(admm=EFFORTS["high"]) != Alps()
    tuned = PruneConfig(model="m", sparsity=0.5, effort="high", options={"admm": {"rho": 0.3}}).build_method()
    assert tuned == Alps(admm=replace(EFFORTS["high"], rho=0.3))
    refitted = PruneConfig(model="m", sparsity=0.5, effort="high", refit=True).build_method()
    assert refitted == Refitted(Alps(admm=EFFORTS["high"]))


@pytest.mark.parametrize(
    ("method", "effort", "sentence"),
    [
        ("alps", "hihg", "Effort 'hihg' is unknown: choose one of normal, high. Did you mean 'high'?"),
        ("wanda", "high", "Method 'wanda' has no --effort high"),
    ],
)
def test_an_effort_that_is_not_there_is_refused(method: str, effort: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        PruneConfig(model="m", sparsity=0.5, method=method, effort=effort).build_method()
