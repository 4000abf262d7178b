"""YAML of users: N:M patterns stay text, broken files and values are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from alps.core.errors import ConfigError
from alps.core.yaml_io import format_validation_error, read_mapping, read_value, read_yaml


def _file(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("'2:4'", "2:4"),
        ("190:20:30", "190:20:30"),
        ("-7", -7),
        ("+7", 7),
        ("0.5", 0.5),
        ("1e-3", "1e-3"),
    ],
)
def test_colons_are_no_base_of_sixty(tmp_path: Path, text: str, value: Any) -> None:
    assert read_yaml(_file(tmp_path, f"key: {text}\n")) == {"key": value}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("model: m\n  bad: [1\n", "is not valid YAML (line 2)"),
        ("a: b: c", "is not valid YAML (line 1)"),
        (b"model: \xff\xfe", "is not valid YAML"),
        (b"model: a\0b", "is not valid YAML"),
        ("[" * 2000, "is not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a: &a [*a]", "refers to itself, or grows too large"),
        ("a: &a [" + "x," * 400 + "]\nb: &b [" + "*a," * 400 + "]", "refers to itself, or grows too large"),
        ("", "must be a mapping"),
        ("- model", "must be a mapping"),
        ("model", "must be a mapping"),
    ],
    ids=["indent", "colons", "not UTF-8", "NUL", "deep", "object", "loop", "bomb", "empty", "list", "word"],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(_file(tmp_path, content))
    assert complaint in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: .+\."):
            read_yaml(path)


def test_values_on_the_command_line_are_yaml() -> None:
    assert read_value("[1, a]", "x=[1, a]") == [1, "a"]
    assert read_mapping("{damping: 0.02, admm: {rho: 0.3}}", "options") == {"damping": 0.02, "admm": {"rho": 0.3}}
    with pytest.raises(ConfigError, match=r"^The value in 'options=\{a' is not valid YAML"):
        read_mapping("{a", "options")
    with pytest.raises(ConfigError, match=r"^Setting 'options' is wrong: write a YAML mapping .*, not '3'\.$"):
        read_mapping("3", "options")


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    samples: int
    seed: int = 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"samples": 1, "sede": 2}, "Setting 'sede' in run.yaml is unknown. Did you mean 'seed'?"),
        ({}, "Setting 'samples' is missing in run.yaml."),
        ({"samples": "x"}, "Setting 'samples' in run.yaml is wrong: input should be a valid integer, not 'x'."),
    ],
)
def test_errors_of_a_validation_are_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Config.model_validate(values)
    assert format_validation_error(caught.value, "run.yaml", _Config.model_fields) == sentence
