"""Safe reading of settings from YAML, with messages of one sentence for whatever is wrong with them."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alps.core.errors import ConfigError, did_you_mean, truncate


class _Loader(yaml.SafeLoader):
    """YAML loader that reads `2:4` as text; YAML 1.1 makes it a number to the base of 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own protocol
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))


# A small file can describe an enormous value, since YAML aliases repeat their target.
_MAX_NODES = 100_000
# Exceptions of PyYAML for broken text, and for tags that do not fit their values.
_PARSE_ERRORS = (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, LookupError)


def read_value(text: str, where: str) -> Any:
    """Parse a single value.

    Args:
        text: in YAML.
        where: the setting that it is given for, for the message.

    Raises:
        ConfigError: when the text is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except _PARSE_ERRORS:
        raise ConfigError(
            f"The value in '{truncate(where)}' is not valid YAML: put it in quotes, or correct it."
        ) from None


def read_mapping(text: str, name: str) -> dict[str, Any]:
    """Read a mapping from a text such as `{damping: 0.02}`.

    Args:
        text: YAML.
        name: setting whose value it is, for error messages.

    Raises:
        ConfigError: for a text that is not a YAML mapping.
    """
    value = read_value(text, f"{name}={text}")
    if not isinstance(value, dict):
        raise ConfigError(f"Setting '{name}' is wrong: write a YAML mapping such as '{{name: value}}', not {text!r}.")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a mapping.

    Raises:
        ConfigError: when the file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"Configuration '{path}' cannot be read: {error.strerror}.") from None
    except _PARSE_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"Configuration '{path}' is not valid YAML{where}.") from None
    if _count_nodes(values, {}) > _MAX_NODES:
        raise ConfigError(f"Configuration '{path}' refers to itself, or grows too large: write its values out.")
    if not isinstance(values, dict):
        raise ConfigError(f"Configuration '{path}' must be a mapping of settings, one 'key: value' a line.")
    return values


def _count_nodes(value: Any, counts: dict[int, float]) -> float:
    """Count the values inside a value, once per reference; infinite when it contains itself.

    Args:
        value: of any type.
        counts: results so far by the id of the value; infinite while a value is being counted.
    """
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in counts:
        counts[id(value)] = math.inf
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        counts[id(value)] = 1 + sum(_count_nodes(part, counts) for part in parts)
    return counts[id(value)]


def format_validation_error(error: ValidationError, where: str, keys: Iterable[str]) -> str:
    """Return the first error of a pydantic validation as one sentence.

    Args:
        error: of the validation.
        where: file or command line that the settings come from.
        keys: valid keys, from which the nearest is suggested for an unknown one.
    """
    first = error.errors()[0]
    key = truncate(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"Setting '{key}' in {where} is unknown.{did_you_mean(key, keys)}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        word = truncate(first["input"])
        near = did_you_mean(word, choices)
        return f"Setting '{key}' in {where} is wrong: '{word}' is unknown, choose one of {', '.join(choices)}.{near}"
    if first["type"] == "missing":
        return f"Setting '{key}' is missing in {where}."
    return f"Setting '{key}' in {where} is wrong: {first['msg'].lower()}, not {reprlib.repr(first['input'])}."
