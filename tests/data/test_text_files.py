"""Formats of text files: the same documents in every form, and sentences for what is none of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alps.core.errors import AlpsError, ConfigError
from alps.data.text_sources import load_text

ROWS = ['He said "yes",\nand went.', "Zwölf ☂ [1]; {x}\tand\u2028more", "", "third, with, commas"]
RECORDS = [{"url": f"http://a/{i}", "n": i, "text": row, "timestamp": "2019"} for i, row in enumerate(ROWS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def _table(delimiter: str, records: list[dict[str, Any]] = RECORDS) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


FORMS: dict[str, tuple[str, str]] = {
    "lines.jsonl": (LINES, "JSON lines, field 'text'"),
    "c4-train.00000-of-01024.json": (LINES, "JSON lines, field 'text'"),
    "lines.ndjson": (LINES.replace("\n", "\r\n"), "JSON lines, field 'text'"),
    "lines.JSONL": (LINES, "JSON lines, field 'text'"),
    "lines.txt": ("\n\n" + LINES, "JSON lines, field 'text'"),
    "no-suffix": (LINES.rstrip(), "JSON lines, field 'text'"),
    "array.json": (json.dumps(RECORDS), "JSON array, field 'text'"),
    "indented.json": (json.dumps(RECORDS, indent=2, ensure_ascii=False), "JSON array, field 'text'"),
    "array.txt": (json.dumps(RECORDS, indent=2), "JSON array, field 'text'"),
    "strings.json": (json.dumps(ROWS), "JSON array of strings"),
    "strings.txt": (json.dumps(ROWS, indent=0), "JSON array of strings"),
    "strings.jsonl": ("\n".join(map(json.dumps, ROWS)), "JSON lines of strings"),
    "values.json": ("\n".join(json.dumps(record, indent=1) for record in RECORDS), "JSON, field 'text'"),
    "inner.json": (json.dumps({"version": "1", "data": RECORDS}), "JSON object, list 'data', field 'text'"),
    "columns.json": (json.dumps({"id": [1], "text": ROWS}), "JSON object, list 'text' of strings"),
    "pandas.json": (
        json.dumps({"text": {str(i): r for i, r in enumerate(ROWS)}}),
        "JSON object, list 'text' of strings",
    ),
    "other.jsonl": (LINES.replace('"text"', '"body"').replace('"url"', '"text"'), "JSON lines, field 'text'"),
    "one.jsonl": ("".join(json.dumps({"n": 1, "body": r}) + "\n" for r in ROWS), "JSON lines, field 'body'"),
    "table.csv": (_table(","), "CSV, column 'text'"),
    "semicolon.csv": (_table(";"), "CSV, column 'text'"),
    "table.tsv": (_table("\t"), "TSV, column 'text'"),
    "table.TSV": (_table("\t").replace("\r\n", "\n"), "TSV, column 'text'"),
    "table.txt": (_table(","), "CSV, column 'text'"),
    "one.csv": (_table(",", [{"n": i, "body": row} for i, row in enumerate(ROWS)]), "CSV, column 'body'"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_documents(name: str, tmp_path: Path) -> None:
    content, words = FORMS[name]
    (tmp_path / name).write_bytes(content.encode())
    text = load_text(str(tmp_path / name), "calibration")
    expected = [record["url"] for record in RECORDS] if name == "other.jsonl" else ROWS
    assert (text.rows, text.format, text.name) == (expected, words, name)
    assert text.origin.documents == len([row for row in expected if row])


def _zstd(data: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write them."""
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    return bytes(compress(data[:40]) + compress(data[40:]))


LAYERS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "gzip": (lambda text: gzip.compress(text.encode()[:50]) + gzip.compress(text.encode()[50:]), "gzip "),
    "zstd": (lambda text: _zstd(text.encode()), "zstd "),
    "bzip2": (lambda text: bz2.compress(text.encode()), "bzip2 "),
    "xz": (lambda text: lzma.compress(text.encode()), "xz "),
    "utf-8 with a mark": (lambda text: text.encode("utf-8-sig"), ""),
    "utf-16": (lambda text: text.encode("utf-16"), "UTF-16 "),
    "utf-16 of the other order": (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), "UTF-16 "),
    "utf-32": (lambda text: text.encode("utf-32"), "UTF-32 "),
    "gzip of utf-16": (lambda text: gzip.compress(text.encode("utf-16")), "gzip UTF-16 "),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["lines.jsonl", "indented.json", "table.csv", "plain.txt"])
def test_layers_are_found_by_content(layer: str, name: str, tmp_path: Path) -> None:
    encode, words = LAYERS[layer]
    content, kind = FORMS.get(name, ("\n".join(ROWS), "plain text"))
    for file in (name, f"{name}.gz", "bare"):
        if file == "bare" and name == "table.csv":
            continue
        (tmp_path / file).write_bytes(encode(content))
        text = load_text(str(tmp_path / file), "evaluation")
        assert text.rows == (ROWS if name in FORMS else ["\n".join(ROWS)])
        assert text.format == words + kind


REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "null": ("a.json", '{"text": "a"}\n{"text": null}\n', "Line 2 of '{}' has no string field 'text'"),
    "null in an array": ("a.json", '[{"text": "a"},\n\n{"text": null}]', "Line 3 of '{}' has no string field 'text'"),
    "several columns": ("a.txt", '{"id": "x", "body": "y"}\n', "2 columns of strings among id, body"),
    "chat": ("a.json", '{"messages": [{"role": "user", "content": "x"}]}', "2 columns of strings among role, content"),
    "identifiers": (
        "a.json",
        '{"id": "a1", "turns": [{"from": "x", "value": "y"}]}\n{"id": "a2", "turns": []}',
        "its only column of strings, id, holds single words such as 'a1'",
    ),
    "addresses in CSV": ("a.csv", "n,url\n1,http://a\n2,http://b\n", "url, holds single words such as 'http://a'"),
    "RTF": ("a.txt", "{\\rtf1 Once}", "is an RTF document"),
    "no strings": ("a.json", '{"n": 1}\n{"n": 2}', "no column of strings among n"),
    "broken first line": ("a.txt", '{"text": "a\n{"text": "b"}\n{"text": "c"}\n', "Line 1 of '{}' is not JSON"),
    "cut short": ("a.txt", '[{"text": "a"},\n{"text": "b', "Line 2 of '{}' is not JSON"),
    "cut after a comma": ("a.json", '["a",\n"b",', "Line 2 of '{}' is not JSON"),
    "no bracket at the end": ("a.json", '[\n{"text": "b"}\n', "is not JSON"),
    "more after an array": ("a.json", '["a",\n"b"]\n"c"', "Line 3 of '{}' is not JSON"),
    "Python": ("a.txt", "{'text': 'a'}\n{'text': 'b'}\n", "Line 1 of '{}' is not JSON"),
    "a heading over JSON": ("a.txt", 'rows\n{"text": "a"}\n{"text": "b"}\n', "Line 1 of '{}' is not JSON"),
    "prose in JSON's clothes": ("a.jsonl", "Once upon a time.\n", "Line 1 of '{}' is not JSON"),
    "prose as CSV": ("a.csv", "Once, upon a time,\nthere was one.\n", "Line 2 of '{}' has 1 fields"),
    "CSV without names": ("a.csv", '3,"one, two"\n4,three\n', "does not name columns"),
    "CSV of two texts": ("a.csv", "title,body\na,b\n", "2 columns of strings among title, body"),
    "CSV with an open quote": ("a.csv", 'n,text\n1,"a\n', "Line 2 of '{}' is not CSV"),
    "Latin-1 in a line": ("a.csv", b"n,text\n1,caf\xe9\n", "is not UTF-8 (byte 12)"),
    "Latin-1 in JSON": ("a.json", b'{"text": "a"}\n{"text": "caf\xe9"}', "is not UTF-8 (byte 27)"),
    "UTF-16 without a mark": (
        "a.txt",
        "Once upon".encode("utf-16-le"),
        "looks like UTF-16LE without a byte order mark",
    ),
    "cut UTF-16": ("a.txt", "Once".encode("utf-16")[:-1], "is damaged UTF-16"),
    "cut gzip": ("a.txt", gzip.compress(b"Once upon" * 99)[:-9], "is damaged or cut short"),
    "gzip twice": ("a.gz", gzip.compress(gzip.compress(b"Once")), "is compressed twice"),
    "tar": ("a.gz", gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 100), "is a tar archive"),
    "zip": ("a.txt", b"PK\x03\x04abc", "is a zip archive"),
    "PDF": ("a.txt", b"%PDF-1.4\n", "is a PDF document"),
    "LFS": ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
    "nothing": ("a.json", "", "is empty"),
    "nothing, compressed": ("a.gz", gzip.compress(b""), "is empty"),
    "an empty array": ("a.json", "[]", "is empty"),
    "an empty object": ("a.json", "{}", "no column of strings among none"),
    "names alone": ("a.csv", "n,text\n", "is empty"),
}


@pytest.mark.parametrize(("name", "content", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_told_in_one_sentence(name: str, content: bytes | str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(AlpsError) as caught:
        load_text(str(path), "calibration")
    assert words.format(path) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_zstd_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = _zstd(b"Once upon a time, there was a text." * 9)
    (tmp_path / "a.zst").write_bytes(whole[:-3])
    with pytest.raises(ConfigError, match="is damaged or cut short"):
        load_text(str(tmp_path / "a.zst"), "calibration")


@pytest.mark.parametrize(
    "prose",
    [
        "[Chapter 1]\n\nOnce.",
        "{{Infobox}} is a mark, {as is this}.",
        "[[File:a.png]]\n",
        '"Yes," he said.\n"No."\n',
        "[1] One.\n[2] Two.",
        "[1]\nA note.",
        "Once, twice,\nor more.",
        "text of a kind, such as this\nand more\n",
    ],
)
def test_prose_with_brackets_and_commas_stays_prose(
    prose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(prose)
    text = load_text(str(tmp_path / "a.txt"), "calibration")
    assert (text.rows, text.format) == ([prose], "plain text") and not caplog.records


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('var rows = [{"text": "a", "n": 1}, {"text": "b"}];', "looks like JSON in part"),
        ("<!DOCTYPE html>\n<p>Once.", "looks like HTML"),
        ("1\ta\n" * 9, "looks like a table"),
        ("a;b;c\n" * 6, "a table"),
    ],
)
def test_marks_and_tables_are_read_with_a_warning(
    content: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(content)
    with caplog.at_level(logging.WARNING, "alps"):
        assert load_text(str(tmp_path / "a.txt"), "calibration").rows == [content]
    assert words in caplog.text


def test_a_tsv_with_bare_quotes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Yes," he said\n2\ta "b\n')
    assert load_text(str(tmp_path / "a.tsv"), "calibration").rows == ['"Yes," he said', 'a "b']


def test_a_field_longer_than_the_limit_of_csv_is_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert load_text(str(tmp_path / "a.csv"), "calibration").rows == ["x" * 200_000]
    assert csv.field_size_limit() == before


def test_the_column_is_that_of_all_first_records(tmp_path: Path) -> None:
    """A field that is null in the first record may hold strings in others."""
    (tmp_path / "a.jsonl").write_text('{"body": "a", "title": null}\n{"body": "b", "title": "t"}\n')
    with pytest.raises(ConfigError, match="2 columns of strings among body, title"):
        load_text(str(tmp_path / "a.jsonl"), "calibration")


@pytest.mark.parametrize("form", ["datasets.json", "lines.jsonl.gz"])
def test_wikitext_in_the_form_of_its_data_set(form: str, tmp_path: Path) -> None:
    plain = " \n = T = \n \n One .\n"
    rows = ["", " = T = \n", "", " One .\n"]
    (tmp_path / "w.txt").write_text(plain)
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (tmp_path / form).write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    (tmp_path / "w.gz").write_bytes(gzip.compress(plain.encode()))
    for name in ("w.txt", form, "w.gz"):
        assert load_text(f"wikitext2:{tmp_path / name}", "evaluation").rows == rows


def _write_arrow(folder: Path, kind: str, columns: dict[str, Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns)
    path = folder / ("train" if kind == "saved" else "a.txt")
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    if kind == "saved":
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    file = path / "d.arrow" if kind == "saved" else path
    make = arrow.ipc.new_file if kind == "file" else arrow.ipc.new_stream
    with arrow.OSFile(str(file), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "saved"])
def test_tables_of_arrow(kind: str, tmp_path: Path) -> None:
    path = _write_arrow(tmp_path, kind, {"url": ["u"] * 4, "n": [1, 2, 3, 4], "text": ROWS})
    text = load_text(str(path), "calibration")
    assert text.rows == ROWS and text.format.endswith("column 'text'")
    if kind == "saved":
        assert load_text(str(tmp_path), "calibration").rows == ROWS


def test_tables_of_arrow_that_are_refused(tmp_path: Path) -> None:
    path = _write_arrow(tmp_path, "parquet", {"text": ["a", "b", None]})
    with pytest.raises(ConfigError, match=r"Row 3 of '.*' has no string in column 'text'"):
        load_text(str(path), "calibration")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="is a damaged parquet file"):
        load_text(str(path), "calibration")
    path = _write_arrow(tmp_path, "parquet", {"id": ["a", "b"], "n": [1, 2]})
    with pytest.raises(ConfigError, match="only column of strings, id, holds single words"):
        load_text(str(path), "calibration")
    path = _write_arrow(tmp_path, "parquet", {"a": ["a"], "b": ["b"]})
    with pytest.raises(ConfigError, match="2 columns of strings among a, b"):
        load_text(str(path), "calibration")


def test_without_pyarrow_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(ConfigError, match=r"which needs a package: run pip install 'alps-prune\[datasets\]'"):
        load_text(str(tmp_path / "a.parquet"), "calibration")


def test_a_saved_data_set_of_several_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match="is a data set of the splits train, test: give the folder of one"):
        load_text(str(tmp_path), "calibration")
