"""Texts in JSON: lines of objects or strings, an array of them, an object that holds one, values one after another."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alps.core.errors import ConfigError
from alps.data.byte_streams import HEAD_BYTES, TextBytes
from alps.data.text_column import SAMPLE_RECORDS, TEXT_COLUMN, check_texts, choose_column, record_columns

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
_START = re.compile(r"""\s*(\{\s*["'}]|\[\s*(["'{\]]|\[\s*["'{\[\d]))""")
_BLANK = re.compile(r"[ \t\r\n]*")
Numbered = Iterator[tuple[int, Any]]


def looks_like_json(head: str) -> bool:
    """Check if a text begins as JSON does, or if most of its first lines are JSON objects.

    Args:
        head: beginning of the text.
    """
    lines = [line for line in head.split("\n")[:SAMPLE_RECORDS] if line.strip()]
    if not lines:
        return False
    if _START.match(head):
        return True
    values = [_try_parse(line) for line in lines]
    if isinstance(values[0], list) and len(values[0]) > 1:
        return True
    if len(values) > 1 and all(isinstance(value, str) for value in values[:-1]):
        return True
    return 2 * sum(isinstance(value, dict) for value in values) > len(values)


def read_json_values(file: TextBytes) -> tuple[Numbered, str]:
    """Return the values of a JSON file with their line numbers, one by one, and the name of the layout.

    Lines of values are read line by line. Everything else is held as one string while it is parsed.

    Raises:
        ConfigError: for a file that is damaged or not JSON, when the values are taken.
    """
    first = next((line for _, line in file.lines() if line.strip()), "")
    # A long line of an array is the whole array, which is not built at once.
    value = None if first.lstrip().startswith("[") and len(first) > HEAD_BYTES else _try_parse(first)
    if value is None and first.lstrip().startswith(("{", "[")) and not _is_lines(file):
        return _scan(file), "JSON array" if first.lstrip().startswith("[") else "JSON"
    if isinstance(value, list) and sum(1 for _, line in itertools.islice(_full_lines(file), 2)) == 1:
        return _scan(file), "JSON array"
    return _parse_lines(file), "JSON lines"


def read_json_texts(file: TextBytes) -> tuple[list[str], str]:
    """Return the texts of a JSON file, and the name of its format.

    Raises:
        ConfigError: for a file that is damaged, not JSON, or without exactly one field of text; for a value without a
            string in it.
    """
    values, layout = read_json_values(file)
    first = list(itertools.islice(values, SAMPLE_RECORDS))
    if len(first) == 1 and isinstance(first[0][1], dict) and (inner := _inner_list(first[0][1])):
        name, items = inner
        first, values = [(first[0][0], item) for item in items], iter(())
        layout = f"JSON object, list '{name}'"
    if first and isinstance(first[0][1], str):
        return list(_strings(itertools.chain(first, values), file.path)), f"{layout} of strings"
    records = [value for _, value in first if isinstance(value, dict)]
    start = f"Line {first[0][0]}" if len(records) < 2 and first else "Every record"
    column = choose_column(record_columns(records), f"{start} of '{file.path}'") if first else TEXT_COLUMN
    texts = list(_fields(itertools.chain(first, values), column, file.path))
    check_texts(texts[:SAMPLE_RECORDS], column, f"{start} of '{file.path}'")
    return texts, f"{layout}, field '{column}'"


def _strings(values: Iterable[tuple[int, Any]], path: Path) -> Iterator[str]:
    for number, value in values:
        if not isinstance(value, str):
            raise ConfigError(f"Line {number} of '{path}' is no string, unlike the first.")
        yield _checked(value, number, path)


def _fields(values: Iterable[tuple[int, Any]], column: str, path: Path) -> Iterator[str]:
    for number, value in values:
        text = value.get(column) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise ConfigError(
                f"Line {number} of '{path}' has no string field '{column}': correct or remove that record."
            )
        yield _checked(text, number, path)


def _checked(text: str, number: int, path: Path) -> str:
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"Line {number} of '{path}' holds half of a surrogate pair: it is not Unicode text.")
    return text


def _inner_list(value: dict[str, Any]) -> tuple[str, list[Any]] | None:
    """Return the list of records inside an object, and its name; None for an object that is a record itself."""
    column = value.get(TEXT_COLUMN)
    if isinstance(column, str):
        return None
    if isinstance(column, dict):  # as pandas writes a table
        return TEXT_COLUMN, list(column.values())
    if isinstance(column, list):
        return TEXT_COLUMN, column
    lists = [(name, items) for name, items in value.items() if isinstance(items, list) and items]
    return lists[0] if len(lists) == 1 else None


def _try_parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _full_lines(file: TextBytes) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in file.lines() if line.strip())


def _is_lines(file: TextBytes) -> bool:
    """Check if most of the first lines are JSON objects, though the very first is broken."""
    lines = [line for _, line in itertools.islice(_full_lines(file), SAMPLE_RECORDS)]
    # A line that is an array may be the whole file.
    objects = [line for line in lines if line.lstrip().startswith("{") and _try_parse(line) is not None]
    return 2 * len(objects) > len(lines)


def _parse_lines(file: TextBytes) -> Numbered:
    for number, line in _full_lines(file):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"Line {number} of '{file.path}' is not JSON: every line must be an object.") from None
        yield number, value


def _scan(file: TextBytes) -> Numbered:
    """Return the values of an array, or values that follow each other, without building them all at once."""
    text, decoder = file.text(), json.JSONDecoder()
    place, counted, line = _skip(text, 0), 0, 1
    in_array = text.startswith("[", place)
    place = _skip(text, place + 1) if in_array else place
    try:
        if in_array and text.startswith("]", place):
            place = _end(text, place)
        while place < len(text):
            line, counted = line + text.count("\n", counted, place), place
            value, place = decoder.raw_decode(text, place)
            yield line, value
            place = _skip(text, place)
            if in_array and text.startswith("]", place):
                place = _end(text, place)
            elif in_array:
                place = _comma(text, place)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
        raise ConfigError(f"Line {line} of '{file.path}' is not JSON, though the file begins like JSON.") from None


def _skip(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    return match.end() if match else place


def _comma(text: str, place: int) -> int:
    if not text.startswith(",", place):
        raise json.JSONDecodeError("no comma", text, place)
    place = _skip(text, place + 1)
    if place == len(text):
        raise json.JSONDecodeError("no value", text, place)
    return place


def _end(text: str, place: int) -> int:
    place = _skip(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("more after the array", text, place)
    return place
