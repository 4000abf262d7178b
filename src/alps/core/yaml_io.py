"""Settings from YAML: read safely, and refused in one sentence."""

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
    """YAML in which `2:4` is a text: 1.1 reads it as a number to the base of 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own protocol
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))


# Aliases of YAML can stand for more values than there is room for.
_MOST_NODES = 100_000
# What PyYAML raises for texts that are broken, or whose tags and values do not go together.
_BROKEN = (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, LookupError)


def read_value(text: str, where: str) -> Any:
    """A single value.

    Raises:
        ConfigError: for a text that is no YAML; names `where` it stands.
    """
    try:
        return yaml.safe_load(text)
    except _BROKEN:
        raise ConfigError(
            f"The value in '{truncate(where)}' is not valid YAML: put it in quotes, or mend it."
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        ConfigError: for a file that is missing, broken, or no mapping.
    """
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"Configuration '{path}' cannot be read: {error.strerror}.") from None
    except _BROKEN as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"Configuration '{path}' is not valid YAML{where}.") from None
    if _nodes(values, {}) > _MOST_NODES:
        raise ConfigError(f"Configuration '{path}' refers to itself, or grows too large: write its values out.")
    if not isinstance(values, dict):
        raise ConfigError(f"Configuration '{path}' must be a mapping of settings, one 'key: value' a line.")
    return values


def _nodes(value: Any, known: dict[int, float]) -> float:
    """Values in a value, each as often as it is referred to; infinite where it holds itself."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(value)]


def format_validation_error(error: ValidationError, where: str, known: Iterable[str]) -> str:
    """The first of the errors that pydantic found in settings, in one sentence.

    Args:
        error: what was found.
        where: the settings came from.
        known: keys that there are, to suggest one.
    """
    first = error.errors()[0]
    key = truncate(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"Setting '{key}' in {where} is unknown.{did_you_mean(key, known)}"
    if first["type"] == "missing":
        return f"Setting '{key}' is missing in {where}."
    return f"Setting '{key}' in {where} is wrong: {first['msg'].lower()}, not {reprlib.repr(first['input'])}."
