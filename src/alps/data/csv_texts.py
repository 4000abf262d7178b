"""Texts in a column of a CSV or TSV file whose first line names the columns."""

from __future__ import annotations

import csv
import io
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alps.core.errors import ConfigError
from alps.data.byte_streams import HEAD_BYTES, TextBytes, decode
from alps.data.text_column import SAMPLE_RECORDS, TEXT_COLUMN, check_texts, choose_column

CSV_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = ",\t;|"
_LIMIT_LOCK = threading.Lock()
Rows = Iterator[tuple[int, list[str]]]


def looks_like_csv(head: str) -> bool:
    """Check if a text begins with names of columns, one of them `text`, and rows of as many fields.

    Args:
        head: beginning of the text.
    """
    line = head.partition("\n")[0]
    delimiter = _delimiter(line)
    if TEXT_COLUMN not in [name.strip('"\r ') for name in line.split(delimiter)] or delimiter not in line:
        return False
    widths = _widths(head, delimiter)
    return len(widths) > 1 and len(set(widths)) == 1


def looks_like_table(head: str) -> bool:
    """Check if the first lines of a text, at least five, have the same number of tabs, or of several semicolons."""
    lines = [line for line in head.split("\n")[:-1][:SAMPLE_RECORDS] if line.strip()]
    for delimiter, least in (("\t", 1), (";", 2), (",", 2), ("|", 2)):
        counts = {line.count(delimiter) for line in lines}
        if len(lines) >= 5 and len(counts) == 1 and counts.pop() >= least:
            return True
    return False


def read_csv_texts(file: TextBytes) -> tuple[list[str], str]:
    """Return the texts of a CSV or TSV file, and the name of its format; a field without content is an empty text.

    Raises:
        ConfigError: for a file that is damaged, has no line of names, rows of other lengths, or not one column of text.
    """
    delimiter = _delimiter(file.head_text().lstrip().partition("\n")[0])
    try:
        return _read(file, delimiter, csv.QUOTE_MINIMAL)
    except ConfigError:
        if delimiter != "\t":
            raise
        # Many TSV files hold quotes as they are.
        try:
            return _read(file, delimiter, csv.QUOTE_NONE)
        except ConfigError:
            pass
        raise


def read_csv_records(file: TextBytes) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV or TSV file by the names in its first line, with their line numbers.

    Quotes in a TSV file are part of its fields, as in GLUE's files.

    Raises:
        ConfigError: for a file that is damaged, or rows of other lengths than the first.
    """
    delimiter = _delimiter(file.head_text().lstrip().partition("\n")[0])
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with file.open() as stream, _long_fields():
        text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        try:
            rows = _rows(text, file.path, delimiter, quoting)
            _, names = next(rows, (1, []))
            return [(number, dict(zip(names, row, strict=True))) for number, row in rows]
        finally:
            text.detach()


def _read(file: TextBytes, delimiter: str, quoting: int) -> tuple[list[str], str]:
    with file.open() as stream, _long_fields():
        text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        rows = _rows(text, file.path, delimiter, quoting)
        try:
            _, names = next(rows, (1, []))
            first = list(itertools.islice(rows, SAMPLE_RECORDS))
            column = _column(names, first, file.path)
            place = names.index(column)
            texts = [row[place] for _, row in itertools.chain(first, rows)]
            check_texts(texts[:SAMPLE_RECORDS], column, f"CSV file '{file.path}'")
        finally:
            text.detach()
    return texts, f"{'TSV' if delimiter == chr(9) else 'CSV'}, column '{column}'"


def _rows(text: Iterable[str], path: Path, delimiter: str, quoting: int) -> Rows:
    """Iterate over the rows that are not blank, with the number of their last line."""
    reader = csv.reader(_valid(text, path), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    width = None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"Line {reader.line_num} of '{path}' is not CSV ({error}).") from None
        if row is None:
            return
        if not row:
            continue
        width = width or len(row)
        if len(row) != width:
            raise ConfigError(
                f"Line {reader.line_num} of '{path}' has {len(row)} fields, and the first line names {width} columns: "
                "quote fields that hold delimiters, or give plain text under another name than .csv and .tsv."
            )
        yield reader.line_num, row


def _valid(text: Iterable[str], path: Path) -> Iterator[str]:
    start = 0
    for line in text:
        data = line.encode("utf-8", "surrogateescape")
        yield decode(data, path, start)
        start += len(data)


def _column(names: list[str], rows: list[tuple[int, list[str]]], path: Path) -> str:
    if TEXT_COLUMN in names:
        return TEXT_COLUMN
    if any(_is_number(name) or not name.strip() or len(name) > 80 for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"The first line of '{path}' does not name columns: give a CSV file with a line of names.")
    fields = {name: [row[i] for _, row in rows] for i, name in enumerate(names)}
    strings = {
        name: any(field.strip() and not _is_number(field) for field in column) for name, column in fields.items()
    }
    return choose_column(strings, f"CSV file '{path}'")


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return field.strip().lower() in ("true", "false")
    return True


def _delimiter(line: str) -> str:
    return max(_DELIMITERS, key=line.count)


def _widths(head: str, delimiter: str) -> list[int]:
    """Return the number of fields of every whole row at the beginning of a file; empty if it is not CSV."""
    text = head if len(head) < HEAD_BYTES // 4 else head[: HEAD_BYTES // 4]
    try:
        with _long_fields():
            widths = [len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error:
        return []
    return widths if text is head else widths[:-1]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Context without the limit of 131,072 characters in a field, which the csv module has for the whole process."""
    with _LIMIT_LOCK:
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(limit)
