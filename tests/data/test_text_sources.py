"""Text sources: what a row is, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from alps.core.errors import ConfigError
from alps.data.text_sources import load_text


def _file(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_plain_file_is_one_row_whatever_its_lines(tmp_path: Path) -> None:
    text = load_text(_file(tmp_path, "a.txt", "One.\r\n\n Zwölf ☂\u2028x\n"), "calibration")
    assert text.rows == ["One.\r\n\n Zwölf ☂\u2028x\n"] and text.name == "a.txt"
    assert text.joined == text.rows[0]


def test_json_lines_are_rows_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    lines = '{"text": "a\\nb", "id": 1}\n\n   \r\n{"id": 2, "text": ""}\r\n{"text": "\u2028c"}'
    text = load_text(_file(tmp_path, "rows.jsonl", lines), "evaluation")
    assert text.rows == ["a\nb", "", "\u2028c"] and text.joined == "a\nb\n\n\n\n\u2028c"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "is not JSON"),
        ('["text"]', "has no string field 'text'"),
        ('{"content": "a"}', "has no string field 'text'"),
        ('{"text": 3}', "has no string field 'text'"),
        ('{"text": null}', "has no string field 'text'"),
        ('"text"', "has no string field 'text'"),
    ],
    ids=["broken", "deep", "huge number", "list", "other field", "number", "null", "string"],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    spec = _file(tmp_path, "rows.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        load_text(spec, "calibration")
    assert str(caught.value).startswith(f"Line 3 of '{spec}' ") and complaint in str(caught.value)


def test_a_row_that_no_tokenizer_takes_is_refused(tmp_path: Path) -> None:
    # Half of a surrogate pair is valid JSON and no valid text.
    spec = _file(tmp_path, "rows.jsonl", '{"text": "good"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ConfigError, match="Line 2"):
        load_text(spec, "calibration")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\)"),
        (b"some\0thing", "holds NUL bytes"),
        (b"", "is empty"),
        (b" \n\t \n", "is empty"),
    ],
    ids=["latin-1", "NUL", "nothing", "blanks"],
)
def test_files_that_hold_no_text_are_refused(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_text(_file(tmp_path, name, content), "calibration")


def test_json_lines_without_any_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        load_text(_file(tmp_path, "a.jsonl", '{"text": ""}\n{"text": " \\n"}\n'), "calibration")


@pytest.mark.parametrize(
    "spec",
    ["no/such/file.txt", "", "wikitext2:", "wikitext2:absent.txt", "x" * 5000],
    ids=["path", "empty", "no path", "wikitext path", "too long for a path"],
)
def test_a_missing_file_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="is neither a file nor one of wikitext2, c4, ptb, python-docs"):
        load_text(spec, "calibration")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, but not one of a saved data set"):
        load_text(str(tmp_path), "calibration")


def test_a_misspelt_corpus_is_put_right() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wikitext2'"):
        load_text("wikitext-2", "evaluation")


def test_the_canonical_wikitext_file_gives_the_papers_text(wikitext: Path) -> None:
    text = load_text(f"wikitext2:{wikitext}", "evaluation")
    assert len(text.rows) == 4358
    assert len(text.joined.encode()) == 1_296_370
    assert text.joined.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")
    assert text.name == "wikitext2:test.txt"


def test_wikitext_rows_end_at_newlines_only(tmp_path: Path) -> None:
    spec = "wikitext2:" + _file(tmp_path, "w.txt", " \n = T = \n \n a\u2028b\x0cc\x85d \n")
    assert load_text(spec, "evaluation").rows == ["", " = T = \n", "", " a\u2028b\x0cc\x85d \n"]


def _paragraphs(rows: Iterable[str]) -> list[str]:
    return [part.strip() for row in rows for part in row.split("\n\n") if part.strip()]


def test_the_python_docs_are_split_without_overlap() -> None:
    from pydoc_data.topics import topics

    calibration = load_text("python-docs", "calibration").rows
    evaluation = load_text("python-docs", "evaluation").rows
    assert not set(calibration) & set(evaluation)
    assert set(_paragraphs(calibration)) | set(_paragraphs(evaluation)) == set(_paragraphs(topics.values()))
    assert sum(map(len, calibration)) > sum(map(len, evaluation)) > 50_000


def test_the_two_halves_of_the_python_docs_share_no_long_passage() -> None:
    # Topics of one page of the reference often repeat each other: text seen in calibration is no held-out text.
    seen = load_text("python-docs", "calibration").joined
    rows = load_text("python-docs", "evaluation").rows
    paragraphs = [part for part in _paragraphs(rows) if len(part) > 200]
    leaked = [part for part in paragraphs if part in seen]
    assert len(paragraphs) > 100
    assert sum(map(len, leaked)) < 0.01 * sum(map(len, paragraphs)), f"{len(leaked)} of {len(paragraphs)}"
