"""Changes of single fields in the text of a JSON object, with every other byte unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from alps.core.json_text import to_json

_SPACE = re.compile(r"\s*")


def replace_fields(text: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a JSON object with other values for some of its fields.

    Args:
        text: a JSON object.
        fields: values by name; names that the object lacks are added behind the last field.
    """
    spans = {name: (start, end) for name, start, end in _value_spans(text)}
    indent = _indent(text)
    edits = [(*spans[name], _dump(value, indent)) for name, value in fields.items() if name in spans]
    new = [f"{to_json(name)}: {_dump(value, indent)}" for name, value in fields.items() if name not in spans]
    if new:
        end = max((end for _, end in spans.values()), default=text.index("{") + 1)
        separator = ", " if indent is None else f",\n{indent}"
        joined = separator.join(new)
        edits.append((end, end, f"{separator}{joined}" if spans else joined))
    for start, end, value in sorted(edits, reverse=True):
        text = text[:start] + value + text[end:]
    return text


def _value_spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each field of an object, and where its value begins and ends."""
    decoder, position = json.JSONDecoder(), _skip(text, text.index("{") + 1)
    while text[position] != "}":
        name, position = scanstring(text, position + 1)
        start = _skip(text, _skip(text, position) + 1)  # behind the colon
        _, end = decoder.raw_decode(text, start)
        yield name, start, end
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _indent(text: str) -> str | None:
    """Return the spaces before the first field; None when it is on the line of the brace."""
    match = re.match(r"\s*\{[^\S\n]*\r?\n([^\S\n]*)", text)
    return None if match is None else match[1]


def _dump(value: Any, indent: str | None) -> str:
    if indent is None or not isinstance(value, list | dict):
        return to_json(value)
    return to_json(value, indent=len(indent) or 2).replace("\n", f"\n{indent}")
