"""The option `bos` on its way through the commands: the windows that a model receives, and the reports."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel
from helpers.command_line import run_alps

_SMALL: dict[str, Any] = {"samples": 4, "seqlen": 32}


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the token ids of every forward of a LLaMA, without those of the checks of the model."""
    ids: list[Tensor] = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def record(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is not None and input_ids.shape[1] == _SMALL["seqlen"]:
            ids.append(input_ids.clone())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", record)
    return ids


@pytest.mark.parametrize("calibration", ["text", "self", "mix"])
def test_prune(
    calibration: str, short_stories: Path, english_file: Path, tmp_path: Path, received: list[Tensor]
) -> None:
    source = {"text": str(english_file), "self": "self", "mix": f"{english_file}:1,self:1"}[calibration]
    token = AutoTokenizer.from_pretrained(short_stories).bos_token_id
    plain = alps.prune(
        short_stories, sparsity=0.5, method="wanda", calibration=source, out=tmp_path / "plain", **_SMALL
    )
    assert plain.calibration is not None and not plain.calibration.bos
    if calibration == "text":
        assert any(bool((ids[:, 0] != token).any()) for ids in received)
    received.clear()
    begun = alps.prune(
        short_stories, sparsity=0.5, method="wanda", calibration=source, bos=True, out=tmp_path / "begun", **_SMALL
    )
    assert received and all(bool((ids[:, 0] == token).all()) for ids in received)
    report = json.loads((tmp_path / "begun" / "report.json").read_text())
    assert begun.calibration is not None and begun.calibration.bos and report["calibration"]["bos"] is True
    assert report["calibration"]["tokens"] == 4 * 32
    assert "each begun with BOS" in (tmp_path / "begun" / "README.md").read_text()


def test_eval_and_compare(
    short_stories: Path,
    english_file: Path,
    tmp_path: Path,
    received: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    token = AutoTokenizer.from_pretrained(short_stories).bos_token_id
    measured = ["--text", english_file, "--windows", 3]
    rows = []
    for flag in ("--no-bos", "--bos"):
        assert run_alps(monkeypatch, "eval", short_stories, *measured, "--seqlen", 32, flag) == 0
        rows += json.loads(capsys.readouterr().out)
    assert [row["bos"] for row in rows] == [False, True]
    assert rows[0]["loss"] != rows[1]["loss"] and rows[0]["predicted_tokens"] == rows[1]["predicted_tokens"] == 3 * 31
    received.clear()
    arguments = ["--sparsity", 0.5, "--methods", "wanda", "--calibration", english_file, "--samples", 4, "--seqlen", 32]
    done = run_alps(
        monkeypatch, "compare", short_stories, tmp_path / "out", *arguments, *measured, "--eval-seqlen", 32, "--bos"
    )
    assert done == 0
    assert received and all(bool((ids[:, 0] == token).all()) for ids in received)
    dense, pruned = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert dense["evaluations"][0]["loss"] == rows[1]["loss"]
    assert pruned["evaluations"][0]["bos"] and pruned["calibration"]["bos"] and pruned["settings"]["bos"]


def test_yaml(short_stories: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alps.yaml").write_text("bos: true\nmethod: wanda\nsparsity: 0.5\nsamples: 4\nseqlen: 32\n")
    words = ["--config", tmp_path / "alps.yaml", "--calibration", english_file]
    assert run_alps(monkeypatch, "prune", short_stories, tmp_path / "out", *words) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["bos"] is True


def test_what_cannot_be_begun_is_refused(short_stories: Path, english_file: Path) -> None:
    loaded = alps.load(short_stories)
    with pytest.raises(ConfigError, match="put the BOS token into the token ids"):
        alps.prune(loaded.model, sparsity=0.5, calibration=torch.ones(2, 16, dtype=torch.int64), bos=True)
    loaded.tokenizer.bos_token = None
    model = LoadedModel("m", loaded.model, loaded.tokenizer)
    with pytest.raises(ConfigError, match="has no BOS token"):
        alps.evaluate(model, english_file, seqlen=32, bos=True)
    with pytest.raises(ConfigError, match="has no BOS token"):
        alps.prune(loaded.model, sparsity=0.5, calibration=english_file, tokenizer=loaded.tokenizer, bos=True, **_SMALL)
