"""Choice of the column of text among the columns of a table or the fields of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alps.core.errors import ConfigError, truncate

TEXT_COLUMN = "text"
# Records from the beginning that decide which field is read.
SAMPLE_RECORDS = 100


def choose_column(columns: Mapping[str, bool], where: str) -> str:
    """Return the column `text`, or else the only column of strings.

    Args:
        columns: names, and whether the column holds strings.
        where: what has these columns, as the beginning of a sentence.

    Raises:
        ConfigError: when there is no column of strings, or several without one named `text`.
    """
    if TEXT_COLUMN in columns:
        return TEXT_COLUMN
    strings = [name for name, holds_strings in columns.items() if holds_strings]
    if len(strings) == 1:
        return strings[0]
    listed = ", ".join(truncate(name) for name in list(columns)[:20]) or "none"
    number = f"{len(strings)} columns of strings" if strings else "no column of strings"
    raise ConfigError(
        f"{where} has no string field '{TEXT_COLUMN}', and {number} among {truncate(listed)}: "
        f"rename the column of the text to '{TEXT_COLUMN}'."
    )


def check_texts(texts: Iterable[str], column: str, where: str) -> None:
    """Refuse a column of another name than `text` that holds names, addresses or times: nothing with a blank in it.

    Args:
        texts: some values from the beginning of the column.
        column: its name.
        where: what has this column, as the beginning of a sentence.

    Raises:
        ConfigError: when every value is one word of ASCII.
    """
    words = [text for text in texts if text.strip()]
    if column != TEXT_COLUMN and words and all(text.isascii() and len(text.split()) == 1 for text in words):
        raise ConfigError(
            f"{where} has no string field '{TEXT_COLUMN}', and its only column of strings, {truncate(column)}, holds "
            f"single words such as '{truncate(words[0])}': rename the column of the text to '{TEXT_COLUMN}'."
        )


def record_columns(records: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the fields of some records, and whether one of their values is a string."""
    columns: dict[str, bool] = {}
    for record in records:
        for name, value in record.items():
            columns[name] = columns.get(name, False) or isinstance(value, str)
    return columns
