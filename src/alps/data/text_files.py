"""Reading of a text file as what its content is: plain text, JSON, CSV, parquet or a saved data set, compressed or not.

The content decides. A name that promises JSON or CSV is taken at its word: content of another kind is refused.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from alps.core.errors import ConfigError
from alps.data.arrow_texts import is_dataset_folder, looks_like_arrow, read_arrow_texts, read_dataset_texts
from alps.data.byte_streams import TextBytes, inspect_bytes
from alps.data.csv_texts import CSV_SUFFIXES, looks_like_csv, looks_like_table, read_csv_texts
from alps.data.json_texts import JSON_SUFFIXES, looks_like_json, read_json_texts

_LOG = logging.getLogger("alps")
PLAIN = "plain text"
_MARKUP = re.compile(r"\s*<(!doctype html|html|\?xml|mediawiki)\b", re.IGNORECASE)
_JSON_FIELD = re.compile(r'"\w+"\s*:\s*["\[{\dtfn-]')
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")


@dataclass(frozen=True)
class FileRows:
    """Documents of a file, and its format in words; a plain text is one document."""

    rows: list[str]
    format: str

    @property
    def is_plain(self) -> bool:
        """True for plain text."""
        return self.format.endswith(PLAIN)


def read_text_file(path: Path) -> FileRows:
    """Read a file, or a folder that `save_to_disk` of datasets wrote.

    Raises:
        ConfigError: for what cannot be read, holds no text, or is not what its name or its beginning says.
    """
    if path.is_dir():
        if not is_dataset_folder(path):
            raise ConfigError(f"Text '{path}' is a folder, but not one of a saved data set: give a file of it.")
        return FileRows(*read_dataset_texts(path))
    file = inspect_bytes(path)
    if looks_like_arrow(file.head):
        if file.compression:
            raise ConfigError(f"Text '{path}' is a {file.compression}-compressed table: decompress it.")
        return FileRows(*read_arrow_texts(path))
    rows, kind = _read_characters(file)
    return FileRows(rows, " ".join([*file.layers, kind]))


def content_suffix(path: Path) -> str:
    """Return the suffix of a file's name without that of its compression, in lower case."""
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return plain.suffix.lower()


def _read_characters(file: TextBytes) -> tuple[list[str], str]:
    suffix, head = content_suffix(file.path), file.head_text()
    if suffix in JSON_SUFFIXES or looks_like_json(head):
        return read_json_texts(file)
    if suffix in CSV_SUFFIXES or looks_like_csv(head):
        return read_csv_texts(file)
    if _MARKUP.match(head):
        _LOG.warning(f"Text '{file.path}' looks like HTML or XML: it is read as plain text, with its tags.")
    elif len(fields := _JSON_FIELD.findall(head)) >= 3 and len(fields) * 300 > len(head):
        _LOG.warning(f"Text '{file.path}' looks like JSON in part: it is read as plain text, with its keys and quotes.")
    elif looks_like_table(head):
        _LOG.warning(
            f"Text '{file.path}' looks like a table: it is read as plain text, with its delimiters; "
            "name it .csv or .tsv, with names of columns in its first line, to read one column."
        )
    return [file.text()], PLAIN
