"""Texts in a column of parquet and Arrow files, and of folders that `Dataset.save_to_disk` wrote; needs pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alps.core.errors import ConfigError, first_line
from alps.data.text_column import SAMPLE_RECORDS, check_texts, choose_column

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_STREAM_MAGIC = b"\xff\xff\xff\xff"


def looks_like_arrow(head: bytes) -> bool:
    """Check if a file is parquet, or Arrow in one of its two forms."""
    return head.startswith((b"PAR1", b"ARROW1\0\0", _STREAM_MAGIC))


def is_dataset_folder(path: Path) -> bool:
    """Check if a folder was written by `save_to_disk`."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def read_arrow_texts(path: Path) -> tuple[list[str], str]:
    """Return the texts of a parquet or Arrow file, and the name of its format.

    Raises:
        ConfigError: without pyarrow; for a file that is damaged, without exactly one column of text, or with a null in
            it.
    """
    return _read([path], path)


def read_dataset_texts(folder: Path) -> tuple[list[str], str]:
    """Return the texts of a folder that `save_to_disk` wrote, and the name of its format.

    Raises:
        ConfigError: as for `read_arrow_texts`; for a folder of several splits.
    """
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS).get("splits")
        if not isinstance(splits, list) or len(splits) != 1:
            names = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
            raise ConfigError(
                f"Text '{folder}' is a data set of the splits {names}: give the folder of one, as in '{folder}/train'."
            )
        return read_dataset_texts(folder / str(splits[0]))
    files = _json(folder / _STATE).get("_data_files") or []
    paths = [folder / str(entry.get("filename")) for entry in files if isinstance(entry, dict)]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise ConfigError(f"Text '{folder}' is a saved data set without its file '{missing.name}': save it again.")
    if (folder / "indices.arrow").is_file() or _json(folder / _STATE).get("_indices_files"):
        raise ConfigError(f"Text '{folder}' is a saved selection of rows: save it again with a newer datasets.")
    texts, kind = _read(paths, folder)
    return texts, kind.replace("Arrow", "saved data set")


def iterate_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Iterate over the rows of a parquet or Arrow file as dictionaries, with their numbers from 1.

    Raises:
        ConfigError: without pyarrow, or for a file that is damaged.
    """
    number = 0
    for batch in _Reader(path).batches(None):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"File '{path}' of a saved data set cannot be read: save it again.") from None
    return value if isinstance(value, dict) else {}


def _read(paths: list[Path], where: Path) -> tuple[list[str], str]:
    texts: list[str] = []
    column, kind = "text", "Arrow"
    for path in paths:
        reader = _Reader(path)
        column, kind = choose_column(reader.columns(), f"Table '{where}'"), reader.kind
        if not reader.columns()[column]:
            raise ConfigError(f"Column '{column}' of table '{where}' holds no strings: give one with a column of text.")
        for batch in reader.batches(column):
            rows = batch.column(0).to_pylist()
            if None in rows:
                raise ConfigError(
                    f"Row {len(texts) + rows.index(None) + 1} of '{where}' has no string in column '{column}': "
                    "remove that row."
                )
            texts += rows
    check_texts(texts[:SAMPLE_RECORDS], column, f"Table '{where}'")
    return texts, f"{kind}, column '{column}'"


class _Reader:
    """Open parquet or Arrow file, read in batches."""

    def __init__(self, path: Path) -> None:
        self._arrow = _pyarrow(path)
        self._path = path
        with path.open("rb") as file:
            head = file.read(8)
        self.kind = "parquet" if head.startswith(b"PAR1") else "Arrow"
        try:
            self._file = self._open(head)
            self._schema = self._file.schema_arrow if self.kind == "parquet" else self._file.schema
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from None

    def columns(self) -> dict[str, bool]:
        """Return the names of the columns, and whether each holds strings."""
        return {field.name: self._is_string(field.type) for field in self._schema}

    def batches(self, column: str | None) -> Iterator[Any]:
        """Iterate over batches of rows, of one column or all."""
        try:
            if self.kind == "parquet":
                yield from self._file.iter_batches(columns=None if column is None else [column])
            elif hasattr(self._file, "num_record_batches"):
                for i in range(self._file.num_record_batches):
                    yield self._select(self._file.get_batch(i), column)
            else:
                for batch in self._file:
                    yield self._select(batch, column)
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from None

    def _is_string(self, kind: Any) -> bool:
        types = self._arrow.types
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_view = getattr(types, "is_string_view", None)
        return bool(types.is_string(kind) or types.is_large_string(kind) or (is_view and is_view(kind)))

    def _open(self, head: bytes) -> Any:
        if self.kind == "parquet":
            import pyarrow.parquet as parquet

            return parquet.ParquetFile(self._path)
        import pyarrow.ipc as ipc

        mapped = self._arrow.memory_map(str(self._path))
        return ipc.open_stream(mapped) if head.startswith(_STREAM_MAGIC) else ipc.open_file(mapped)

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(f"Text '{self._path}' is a damaged {self.kind} file ({first_line(error)}): fetch it again.")

    @staticmethod
    def _select(batch: Any, column: str | None) -> Any:
        return batch if column is None else batch.select([column])


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            f"Text '{path}' is a parquet or Arrow file, which needs a package: "
            "run pip install 'alps-prune[datasets]', or give JSON lines."
        ) from None
    return pyarrow
