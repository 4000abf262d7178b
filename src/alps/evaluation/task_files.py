"""Files of the items of zero-shot tasks: JSON, parquet, CSV, and separate files of labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from alps.core.errors import ConfigError
from alps.data.byte_streams import inspect_bytes
from alps.data.csv_texts import read_csv_records
from alps.data.text_sources import read_records

Rows = list[tuple[int, Any]]
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".tsv", ".csv")
_COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
_CSV = (".tsv", ".csv")
_COLUMNS = ("question", *"ABCD", "answer")
# End of the names of MMLU's files, one for each subject.
_SUBJECT_END = "_test.csv"


def read_items(task: str, folder: Path) -> tuple[Path, Rows]:
    """Read the items of a task, in whichever format they lie in a folder.

    These are `TASK.jsonl`, `.json`, `.parquet`, `.tsv` or `.csv`, compressed or not; `TASK-labels.lst` next to it with
    one label in every line, as PIQA is published; or a folder `mmlu` of MMLU's own files, `SUBJECT_test.csv`.

    Returns:
        The file, or folder, and its items with the numbers of their lines.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    names = [f"{task}{suffix}{layer}" for layer in _COMPRESSED for suffix in _SUFFIXES]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None and task == "mmlu" and (folder / task).is_dir():
        return folder / task, _read_subjects(folder / task)
    if path is None:
        raise ConfigError(f"Task '{task}' needs its items in '{folder / names[0]}', which does not exist.")
    is_csv = any(path.name.removeprefix(task).startswith(suffix) for suffix in _CSV)
    rows = read_csv_records(inspect_bytes(path)) if is_csv else read_records(path)
    labels = folder / f"{task}-labels.lst"
    return path, _with_labels(rows, path, labels) if labels.is_file() else rows


def _with_labels(rows: Rows, path: Path, file: Path) -> Rows:
    labels = inspect_bytes(file).text().split()
    if len(labels) != len(rows):
        raise ConfigError(f"File '{file}' has {len(labels)} labels for the {len(rows)} items of '{path}'.")
    return [
        (number, {"label": label, **row} if isinstance(row, dict) else row)
        for (number, row), label in zip(rows, labels, strict=True)
    ]


def _read_subjects(folder: Path) -> Rows:
    """Read MMLU's own files: a question, four choices and a letter in every row, without a line of names."""
    paths = sorted(folder.glob(f"*{_SUBJECT_END}"))
    if not paths:
        raise ConfigError(f"Task data '{folder}' has no files SUBJECT{_SUBJECT_END}: give those that MMLU publishes.")
    rows: Rows = []
    for path in paths:
        subject = path.name.removesuffix(_SUBJECT_END)
        try:
            lines = list(csv.reader(inspect_bytes(path).text().splitlines(keepends=True), strict=True))
        except csv.Error as error:
            raise ConfigError(f"Task data '{path}' is not CSV ({error}).") from None
        for fields in filter(None, lines):
            if len(fields) != len(_COLUMNS):
                raise ConfigError(
                    f"Row {len(rows) + 1} of '{path}' has {len(fields)} fields, where MMLU has six: the question, "
                    "four choices, and a letter."
                )
            rows.append((len(rows) + 1, {"subject": subject, **dict(zip(_COLUMNS, fields, strict=True))}))
    return rows
