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
        f"rename the column of the text to '{TEXT_COLUMN}', and remove or keep the others."
    )


def record_columns(records: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the fields of some records, and whether one of their values is a string."""
    columns: dict[str, bool] = {}
    for record in records:
        for name, value in record.items():
            columns[name] = columns.get(name, False) or isinstance(value, str)
    return columns
