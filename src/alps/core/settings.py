"""Configs: frozen pydantic models whose fields are described once, for command line, YAML, Python and documentation."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from alps.core.errors import ConfigError
from alps.core.yaml_io import format_validation_error, read_yaml

# Panels of the settings, in the order in which help texts, YAML files and docs/reference/settings.md list them.
PANELS = WHAT, HOW, CALIBRATION, MEASUREMENTS, TASKS, RESOURCES, OUTPUT = (
    "What to prune",
    "How",
    "Calibration",
    "Measurements",
    "Zero-shot tasks",
    "Resources",
    "Output",
)
# Descriptions of settings that several commands have.
MODEL = "Model: a directory, a .gguf file, a hub name (owner/name), or smollm2-135m."
BOS = "Begin every window with the tokenizer's BOS token, for models that need it, such as Gemma."
COMMAND_LINE = "the command line"
ARGUMENTS = "the arguments"
_Config = TypeVar("_Config", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """Further metadata of a config field than type, default and description; used as `Annotated[type, Setting(...)]`.

    Attributes:
        panel: heading under which the command line and docs/reference/settings.md list the field.
        metavar: placeholder of the value in help texts, such as `SHARE`.
        choices: permitted words; those of a `Literal` need not be repeated.
        default: words that stand for the default value where it is not a constant, such as `by preset`.
        flag: name of the command-line option where it is not the field's name.
        repeated: whether the command line takes a list as several options, and not as one text with commas.
        affects_weights: whether the result depends on the field; then it is part of the fingerprint of a run.
    """

    panel: str = "Options"
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    default: str | None = None
    flag: str | None = None
    repeated: bool = False
    affects_weights: bool = True


@dataclass(frozen=True)
class ConfigField:
    """Description of one config field.

    Attributes:
        name: key in YAML and keyword in Python.
        option: long option of the command line, with dashes.
        value_type: `bool`, `int`, `float` or `str`; `str` for lists and mappings, which are written as one text.
        default: default value in words.
        help: description, choices included, without the default.
        choices: permitted words; none if there are others.
        setting: metadata of the field.
    """

    name: str
    option: str
    value_type: type
    default: str
    help: str
    choices: tuple[str, ...]
    setting: Setting


def describe_fields(config: type[BaseModel]) -> Iterator[ConfigField]:
    """List the fields of a config in the order of `PANELS`; within a panel, those of a base class come first."""
    fields = [(name, field, _setting(field)) for name, field in config.model_fields.items()]
    for name, field, setting in sorted(fields, key=lambda row: _position(row[2].panel)):
        choices = setting.choices or _literal_choices(field.annotation)
        listed = f" One of {', '.join(choices)}." if choices else ""
        yield ConfigField(
            name=name,
            option=f"--{(setting.flag or name).replace('_', '-')}",
            value_type=_value_type(field.annotation),
            default=_default_words(field, setting),
            help=f"{field.description or ''}{listed}",
            choices=choices,
            setting=setting,
        )


def _setting(field: FieldInfo) -> Setting:
    return next((item for item in field.metadata if isinstance(item, Setting)), Setting())


def _position(panel: str) -> int:
    return PANELS.index(panel) if panel in PANELS else len(PANELS)


def make_config(config: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Validate the values that are not None.

    Args:
        config: class of the config.
        values: values by field name; None stands for the default.
        where: origin of the values for error messages, such as `the command line`.

    Raises:
        ConfigError: for an unknown name, or a value of the wrong kind or range.
    """
    try:
        return config.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, where, config.model_fields)) from None


def load_config(
    config: type[_Config],
    path: Path | None,
    overrides: Mapping[str, Any],
    merge: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda values, given: {**values, **given},
) -> _Config:
    """Make a config from a YAML file with overrides on top.

    Args:
        config: class of the config.
        path: YAML file, if any.
        overrides: values by field name that replace those of the file; None stands for no override.
        merge: combines the values of the file with the overrides that are not None.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind or range.
    """
    values = read_yaml(path) if path else {}
    explicit = {name: value for name, value in overrides.items() if value is not None}
    return make_config(config, merge(values, explicit), str(path) if path else COMMAND_LINE)


def _literal_choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _value_type(annotation: Any) -> type:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation if annotation in (bool, int, float) else str


def _default_words(field: FieldInfo, setting: Setting) -> str:
    if setting.default is not None:
        return setting.default
    if field.is_required():
        return "required"
    value = field.get_default()
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
