"""Windows of joined documents: the same tokens whether all documents are tokenised, or only those that are needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alps.data import joined_documents
from alps.data.joined_documents import JoinedDocuments
from alps.data.text_sources import Text
from helpers.log_messages import log_messages


class _Letters:
    """Tokenizer with one token for every letter; it records what it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, rows: list[str], **_settings: Any) -> Any:
        self.read += rows
        return SimpleNamespace(input_ids=[[ord(letter) for letter in row.strip("-")] for row in rows])


class _Steps:
    """Progress that records its steps."""

    def __init__(self) -> None:
        self.titles: list[tuple[str, int]] = []
        self.steps: list[str] = []

    def start(self, title: str, total: int) -> None:
        self.titles.append((title, total))

    def step(self, detail: str) -> None:
        self.steps.append(detail)

    def finish(self) -> None:
        self.steps.append("end")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "cache"))


@settings(max_examples=40)
@given(
    # Documents of blanks are left out; "-" is a document without a token.
    rows=st.lists(st.sampled_from(["a", "bcd", " ", "-", "efghijk", "lm"]), min_size=1, max_size=12),
    separator=st.sampled_from([None, 0]),
    batch=st.integers(1, 4),
    width=st.integers(1, 6),
)
def test_windows_are_slices_of_the_joined_tokens(
    rows: list[str], separator: int | None, batch: int, width: int
) -> None:
    end = [] if separator is None else [separator]
    joined = torch.tensor([token for row in rows if row.strip() for token in [*map(ord, row.strip("-")), *end]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_documents, "_BATCH", batch)
        documents = JoinedDocuments(Text("t", rows), _Letters(), separator)
        assert documents.tokens == len(joined)
        starts = torch.arange(max(len(joined) - width + 1, 0)).flip(0)
        if len(starts):
            expected = torch.stack([joined[int(start) : int(start) + width] for start in starts])
            assert torch.equal(documents.read(starts, width), expected)


def test_of_a_large_text_only_the_documents_under_the_windows_are_tokenised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joined_documents, "_BATCH", 4)
    rows, tokenizer, steps = [f"{i:04}" for i in range(10)], _Letters(), _Steps()
    documents = JoinedDocuments(Text("c4", rows), tokenizer, 0, steps)
    assert tokenizer.read == rows
    assert steps.titles == [("counting tokens of c4", 3)]
    assert steps.steps == ["4 documents", "8 documents", "10 documents", "end"]
    tokenizer.read.clear()
    documents.read(torch.tensor([31, 3]), 4)
    assert tokenizer.read == ["0000", "0001", "0006"]


def test_counts_are_kept_for_a_tokenizer_and_a_text(
    word_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_documents, "_BATCH", 4)
    folder = tmp_path / "cache" / "token-counts"

    def count(rows: list[str], separator: int | None = 1) -> tuple[int, int]:
        steps = _Steps()
        tokens = JoinedDocuments(Text("t", rows), word_tokenizer, separator, steps).tokens
        return tokens, len(steps.titles)

    rows = ["one", "two", "three", "four", "five"]
    assert count(rows) == (24, 1) and count(rows) == (24, 0)
    # The same letters in other documents, and documents without separators.
    assert count(["one", "two", "three", "fourf", "ive"]) == (24, 1)
    assert count(rows, None) == (19, 1)
    (path, *_others) = sorted(folder.iterdir())
    assert len(_others) == 2
    for file in folder.iterdir():
        file.write_bytes(path.read_bytes()[:50])
    assert count(rows) == (24, 1)


def test_a_cache_that_cannot_be_written_costs_a_line(
    word_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_documents, "_BATCH", 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with log_messages() as messages:
        assert JoinedDocuments(Text("t", ["one", "two"]), word_tokenizer, None).tokens == 6
    assert any(message.startswith("The counts cannot be kept in '") for message in messages)
