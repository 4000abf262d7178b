"""Files of zero-shot items in every format, and labels beside them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from alps.core.errors import ConfigError
from alps.evaluation.local_tasks import read_documents
from alps.evaluation.task_files import read_items

PIQA = [{"goal": f"Boil {n} eggs.", "sol1": "in water", "sol2": "in sand"} for n in range(3)]
LABELS = [0, 1, 0]
ROWS = [{**row, "label": label} for row, label in zip(PIQA, LABELS, strict=True)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("piqa.jsonl", LINES.encode()),
        ("piqa.json", json.dumps(ROWS, indent=1).encode()),
        ("piqa.jsonl.gz", gzip.compress(LINES.encode())),
        ("piqa.ndjson", LINES.encode("utf-16")),
        (
            "piqa.csv",
            b"goal,sol1,sol2,label\r\n"
            + b"".join(b"Boil %d eggs.,in water,in sand,%d\r\n" % p for p in enumerate(LABELS)),
        ),
    ],
    # Compressed bytes hold the time, and the ids of a test must be those of every worker.
    ids=["lines", "array", "gzip", "utf-16", "csv"],
)
def test_formats_of_items(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    documents = read_documents("piqa", tmp_path)
    assert [document["gold"] for document in documents] == LABELS
    assert [document["context"] for document in documents] == [f"Question: {r['goal']}\nAnswer:" for r in PIQA]


def test_items_in_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "arc_easy.parquet")
    assert read_documents("arc_easy", tmp_path)[0]["gold"] == 1


def test_labels_beside_the_items(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    with pytest.raises(ConfigError, match=r"\(label: Field required\): it has the fields goal, sol1, sol2, and goal"):
        read_documents("piqa", tmp_path)
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n0\n")
    assert [document["gold"] for document in read_documents("piqa", tmp_path)] == LABELS
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n")
    with pytest.raises(ConfigError, match="has 2 labels for the 3 items"):
        read_documents("piqa", tmp_path)


def test_glues_own_file_of_rte(tmp_path: Path) -> None:
    (tmp_path / "rte.tsv").write_text(
        'index\tsentence1\tsentence2\tlabel\n0\t"A" man sits.\tHe "sits.\tnot_entailment\n1\ta\tb\tentailment\n'
    )
    first, second = read_documents("rte", tmp_path)
    assert first["context"] == '"A" man sits.\nQuestion: He "sits. True or False?\nAnswer:'
    assert [first["gold"], second["gold"]] == [1, 0]


def test_mmlus_own_files(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()
    with pytest.raises(ConfigError, match=r"has no files SUBJECT_test\.csv"):
        read_documents("mmlu", tmp_path)
    for subject, answer in (("us_law", "C"), ("astronomy", "A")):
        stream = io.StringIO(newline="")
        csv.writer(stream).writerow([f"Why,\nin {subject}?", "a", "b", '"c"', "d", answer])
        (tmp_path / "mmlu" / f"{subject}_test.csv").write_text(stream.getvalue())
    documents = read_documents("mmlu", tmp_path)
    assert [document["gold"] for document in documents] == [0, 2]
    assert documents[1]["context"].startswith(
        "The following are multiple choice questions (with answers) about us law.\n\nWhy,\nin us_law?\nA. a\n"
    )
    path, rows = read_items("mmlu", tmp_path)
    assert path == tmp_path / "mmlu" and rows[0][1]["subject"] == "astronomy"
    (tmp_path / "mmlu" / "us_law_test.csv").write_text("a,b,c\n")
    with pytest.raises(ConfigError, match="has 3 fields, where MMLU has six"):
        read_documents("mmlu", tmp_path)


def test_winogrande_with_a_file_of_labels(tmp_path: Path) -> None:
    row = {"sentence": "The _ is big.", "option1": "cat", "option2": "dog"}
    (tmp_path / "winogrande.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    (tmp_path / "winogrande-labels.lst").write_text("2\n1\n")
    assert [document["gold"] for document in read_documents("winogrande", tmp_path)] == [1, 0]
