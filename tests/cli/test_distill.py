"""The command that distills: zeros stay, and wrong inputs are one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import contents, run_alps


def test_distill_keeps_the_zeros_that_inspect_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path
) -> None:
    pruned, out = text.parent / "pruned", text.parent / "recovered"
    assert (
        run_alps(
            monkeypatch, "prune", stories, pruned, "--sparsity", 0.7, "--method", "magnitude", "--no-measure-error"
        )
        == 0
    )
    sizes = ["--calibration", text, "--samples", 16, "--seqlen", 32, "--batch-tokens", 128, "--lr", 0.002]
    capsys.readouterr()
    assert run_alps(monkeypatch, "distill", stories, pruned, out, "--steps", 12, *sizes) == 0
    printed = capsys.readouterr()
    assert "Distilled, so not one-shot: 12 steps, 1,536 tokens, lr 0.002" in printed.out
    assert "158,600 of 226,560 weights are zero" in printed.out
    assert "12/12" in printed.err
    zeros = []
    for folder in (pruned, out):
        assert run_alps(monkeypatch, "inspect", folder, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        zeros.append([(site["name"], site["zeros"]) for site in found["layers"]])
    assert zeros[0] == zeros[1] and sum(count for _, count in zeros[0]) == 158_600


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}", "{model}", "{tmp}/out", "--steps", "2"], "Nothing is pruned"),
        (["{model}", "{model}", "{tmp}/out"], "either --minutes"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--minutes", "1"], "not both"),
        (["{model}", "{model}", "{tmp}/out", "--minutes", "-3"], "Setting 'minutes'"),
        (["{model}", "{tmp}/nowhere", "{tmp}/out", "--steps", "2"], "does not exist"),
        (["{tmp}/nowhere", "{model}", "{tmp}/out", "--steps", "2"], "does not exist"),
        (["{model}", "{model}", "{tmp}", "--steps", "2"], "not empty"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--device", "quantum"], "cannot be used here"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--dtype", "int3"], "is unknown"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--calibration", "nowhere.txt"], "neither a file"),
    ],
)
def test_wrong_recoveries_are_one_sentence_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    text: Path,
    arguments: list[str],
    expected: str,
) -> None:
    before = contents(text.parent)
    filled = [word.format(model=stories, tmp=text.parent) for word in arguments]
    assert run_alps(monkeypatch, "distill", *filled[:3], "--calibration", text, *filled[3:]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and printed.err.count("\n") == 1
    assert contents(text.parent) == before
