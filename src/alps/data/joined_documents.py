"""Tokens of a text's documents, joined by a separator, of which windows are read.

A shard of C4 has 180 million tokens, which take minutes to make and gigabytes to hold, and a calibration reads a
thousandth of them. Where the windows of a seed lie depends on the number of tokens of every document alone. These
numbers are counted once, and kept; then only the documents under the windows are tokenised.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from alps.core.cache import cache_folder
from alps.core.progress import NoProgress, Progress
from alps.data.tensor_cache import read_cached, write_cached
from alps.data.text_sources import Text

_LOG = logging.getLogger("alps")

# Documents that are tokenised at once; a text of no more is held as tokens.
_BATCH = 4096
# To be raised with every change that gives other numbers of tokens.
_VERSION = 1


class JoinedDocuments:
    """Documents of a text that are not blank, each followed by a separator.

    Args:
        text: its rows are the documents.
        tokenizer: of the model.
        separator: token behind every document; None for none.
        progress: advanced while the tokens of a text of more than 4096 documents are counted.

    Attributes:
        tokens: number of tokens of all documents, with the separators.
    """

    def __init__(self, text: Text, tokenizer: Any, separator: int | None, progress: Progress | None = None) -> None:
        self._rows = [row for row in text.rows if row.strip()]
        self._tokenizer, self._end = tokenizer, [] if separator is None else [separator]
        self._ids = self._tokenize(self._rows) if len(self._rows) <= _BATCH else None
        if self._ids is None:
            counts = self._counts(text.name, progress or NoProgress())
        else:
            counts = torch.tensor([len(ids) for ids in self._ids], dtype=torch.int64)
        self._ends = counts.cumsum(0)
        self.tokens = int(counts.sum())

    def read(self, starts: Tensor, width: int) -> Tensor:
        """Return windows of tokens.

        Args:
            starts: index of the first token of every window, int64, shape (windows,).
            width: tokens in a window.

        Returns:
            Token ids, int64, shape (windows, width).
        """
        first = torch.searchsorted(self._ends, starts, right=True)
        last = torch.searchsorted(self._ends, starts + width - 1, right=True)
        ranges = [range(int(i), int(j) + 1) for i, j in zip(first, last, strict=True)]
        numbers = sorted({number for part in ranges for number in part})
        ids = dict(zip(numbers, self._documents(numbers), strict=True))
        windows = []
        for start, part in zip(starts.tolist(), ranges, strict=True):
            begin = start - (int(self._ends[part[0] - 1]) if part[0] else 0)
            windows.append(torch.cat([ids[number] for number in part])[begin : begin + width])
        return torch.stack(windows)

    def _documents(self, numbers: Sequence[int]) -> list[Tensor]:
        if self._ids is not None:
            return [self._ids[number] for number in numbers]
        return self._tokenize([self._rows[number] for number in numbers])

    def _tokenize(self, rows: list[str]) -> list[Tensor]:
        """Return the token ids of documents with their separators, each int64, shape (tokens,)."""
        batches = [self._encode(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
        return [torch.tensor([*ids, *self._end], dtype=torch.int64) for batch in batches for ids in batch]

    def _encode(self, rows: list[str]) -> list[list[int]]:
        # In batches: a tokenizer holds a hundred bytes for every token.
        encoded: list[list[int]] = self._tokenizer(rows, add_special_tokens=False, verbose=False).input_ids
        return encoded

    def _counts(self, name: str, progress: Progress) -> Tensor:
        """Return the number of tokens of every document with its separator, int64, shape (documents,)."""
        key = self._key()
        path = None if key is None else cache_folder() / "token-counts" / f"{key[:32]}.safetensors"
        if path is not None and (counts := read_cached(path, (len(self._rows),))) is not None:
            return counts
        batches = range(0, len(self._rows), _BATCH)
        _LOG.info(f"Counting the tokens of '{name}', {len(self._rows):,} documents, once for this tokenizer ...")
        progress.start(f"counting tokens of {name}", len(batches))
        try:
            parts = []
            for start in batches:
                batch = self._encode(self._rows[start : start + _BATCH])
                parts.append(torch.tensor([len(ids) + len(self._end) for ids in batch], dtype=torch.int64))
                progress.step(f"{min(start + _BATCH, len(self._rows)):,} documents")
        finally:
            progress.finish()
        counts = torch.cat(parts)
        if path is not None:
            try:
                write_cached(path, counts)
            except OSError as error:
                _LOG.warning(f"The counts cannot be kept in '{path.parent}': {error.strerror or error}.")
        return counts

    def _key(self) -> str | None:
        """Return a hash of the documents and of the tokenizer; None for one whose rules cannot be read."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        name = type(self._tokenizer).__name__
        sha256 = hashlib.sha256(f"{_VERSION} {version('tokenizers')} {name} {len(self._end)}\0".encode())
        sha256.update(backend.to_str().encode())
        for row in self._rows:
            sha256.update(f"\0{len(row)}\0".encode())
            sha256.update(row.encode())
        return sha256.hexdigest()
