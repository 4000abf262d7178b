"""The commands that measure and count: what they refuse, and what is broken or dense."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from helpers.command_line import run_alps


def test_inspect_counts_broken_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path
) -> None:
    out = text.parent / "pruned"
    arguments = ["--pattern", "2:4", "--method", "magnitude", "--no-measure-error"]
    assert run_alps(monkeypatch, "prune", stories, out, *arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :4] = 1.0
        weight[5, 8:11] = 1.0
    model.save_pretrained(out)
    assert run_alps(monkeypatch, "inspect", out) == 0
    assert "Pattern 2:4: BROKEN in 2 of 56,640 groups." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}", "--text", "{text}", "--seqlen", "200000"], "longer than the 512"),
        (["{model}", "--text", "{short}", "--seqlen", "256"], "too few for one window"),
        (["{model}", "--text", "nowhere.txt", "--seqlen", "64"], "neither a file nor one of"),
        (["{model}", "--text", "self", "--seqlen", "64"], "one of wikitext2, c4, ptb, python-docs.\n"),
        (["nowhere/at/all", "--text", "{text}"], "neither an existing directory"),
        (["{model}"], "nothing to measure: give --text, --tasks or both"),
        (["{model}", "--text", "{text}", "--seqlen", "64", "--reference", "nowhere/at/all"], "neither an existing"),
        (["{model}", "--tasks", "piqa", "--reference", "{model}"], "--reference has no effect without --text"),
        (["{model}", "--tasks", "piqa", "--windows", "3"], "--windows has no effect without --text"),
        (["{model}", "--text", "{text}", "--limit", "3"], "--limit has no effect without --tasks"),
        (["{model}", "--text", "{text}", "--task-data", "x"], "--task-data has no effect without --tasks"),
        (["{model}", "--text", "{text}", "--batch-size", "2"], "--batch-size has no effect without --tasks"),
        (["{model}", "--text", "{text}", "--card"], "README.md' does not exist: give a directory that alps wrote"),
        (["{model}", "--tasks", ","], "No task is named"),
        # A model that does not exist: tasks are checked before it is loaded.
        (["nowhere/at/all", "--tasks", "piqa", "--task-data", "{text}"], "is not a directory"),
        (["nowhere/at/all", "--tasks", "piqa,pica", "--task-data", "{tmp}"], "piqa.jsonl', which does not exist"),
        (["nowhere/at/all", "--tasks", "pica", "--task-data", "{tmp}"], "Did you mean 'piqa'?"),
        (["nowhere/at/all", "--tasks", "winogrande", "--task-data", "{tmp}"], "Line 1 of "),
    ],
)
def test_wrong_evaluations(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    text: Path,
    arguments: list[str],
    expected: str,
) -> None:
    short = text.parent / "short.txt"
    short.write_text("Too short.")
    (text.parent / "winogrande.jsonl").write_text('{"sentence": "a _", "option1": "b"}')
    filled = [word.format(model=stories, text=text, short=short, tmp=text.parent) for word in arguments]
    assert run_alps(monkeypatch, "eval", *filled) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and printed.err.count("\n") == 1


def test_figures_go_to_the_card_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short_stories: Path, text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(short_stories, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: karpathy/tinyllamas\n---\n# Stories\n")
    out = tmp_path / "pruned"
    assert (
        run_alps(monkeypatch, "prune", model, out, "--sparsity", "0.5", "--method", "magnitude", "--no-measure-error")
        == 0
    )
    capsys.readouterr()
    assert run_alps(monkeypatch, "eval", out, "--text", text, "--seqlen", "64", "--windows", "2", "--card") == 0
    (row,) = json.loads(capsys.readouterr().out)
    card: Any = ModelCard.load(out / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == round(row["perplexity"], 4) and result.metric_args["windows"] == 2
    assert (card.data.license, card.data.base_model) == ("mit", "karpathy/tinyllamas")
    assert "Licence: that of the source, `mit`." in card.text
    # A packed directory keeps the metadata.
    assert run_alps(monkeypatch, "pack", out, tmp_path / "packed") == 0
    packed: Any = ModelCard.load(tmp_path / "packed" / "README.md")
    assert packed.data.license == "mit" and packed.data.eval_results == card.data.eval_results


def test_inspecting_a_dense_model_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path
) -> None:
    assert run_alps(monkeypatch, "inspect", stories, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == 0 and found["claimed"] is None and found["checks"] == []
    reasons = [row["reason"] for row in found["dense"]]
    assert reasons == ["embedding or output head"] + ["no zeros in it"] * 35
    assert run_alps(monkeypatch, "inspect", stories) == 0
    assert "Dense: 16 more, see --json" in capsys.readouterr().out


def test_the_same_documents_have_the_same_perplexity_in_every_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path, tmp_path: Path
) -> None:
    rows = text.read_text().split(". ")
    records = [{"text": row, "url": f"http://a/{i}"} for i, row in enumerate(rows)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_bytes(json.dumps(records, indent=1).encode("utf-16"))
    figures = []
    for name in ("a.jsonl", "c4-train.00000-of-01024.json.gz", "a.txt"):
        assert run_alps(monkeypatch, "eval", stories, "--text", tmp_path / name, "--seqlen", 64, "--windows", 4) == 0
        record = json.loads(capsys.readouterr().out)
        figures.append({**(record[0] if isinstance(record, list) else record), "text": None})
    formats = [figure.pop("format") for figure in figures]
    assert formats == ["JSON lines, field 'text'", "gzip JSON lines, field 'text'", "UTF-16 JSON array, field 'text'"]
    assert figures[0] == figures[1] == figures[2] and figures[0]["documents"] == len([row for row in rows if row])
