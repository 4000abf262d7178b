"""Perplexity against a loop that does it the slow way, and what cannot be evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel, load


def _naive(model: Any, tokens: list[int], seqlen: int) -> tuple[int, float]:
    """Perplexity one window at a time, by the model's own loss."""
    losses = []
    for start in range(0, len(tokens) - seqlen + 1, seqlen):
        window = torch.tensor([tokens[start : start + seqlen]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    return len(losses), math.exp(sum(losses) / len(losses))


def _text(folder: Path, content: str) -> str:
    path = folder / "text.txt"
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(("seqlen", "characters"), [(2, 900), (31, 6000), (64, 6000)])
def test_perplexity_is_that_of_a_plain_loop(
    stories: Path, english: str, tmp_path: Path, seqlen: int, characters: int
) -> None:
    loaded = load(str(stories))
    tokens = loaded.tokenizer(english[:characters]).input_ids
    assert tokens[0] == loaded.tokenizer.bos_token_id
    assert len(tokens) > 2100 or seqlen == 2, "the longer windows fill more than one batch"
    count, expected = _naive(loaded.model, tokens, seqlen)
    (record,) = alps.evaluate(loaded, [_text(tmp_path, english[:characters])], seqlen=seqlen)
    assert record.perplexity == pytest.approx(expected, rel=1e-5) and record.windows == count == len(tokens) // seqlen
    assert record.predicted_tokens == count * (seqlen - 1) and record.seqlen == seqlen
    assert record.loss == pytest.approx(math.log(expected), rel=1e-5)
    assert (record.model, record.text) == (str(stories), "text.txt")


def test_windows_on_the_edge(tiny_model: Callable[..., Any], word_tokenizer: Any, kind: str, tmp_path: Path) -> None:
    loaded = LoadedModel("tiny", tiny_model(kind), word_tokenizer)
    text = "the quick brown fox jumps over it"[:32]  # 32 characters are 32 tokens
    tokens = word_tokenizer(text).input_ids
    assert len(tokens) == 32 and word_tokenizer.unk_token_id not in tokens
    path = _text(tmp_path, text)
    for seqlen, windows in ((16, 2), (17, 1), (32, 1)):
        (record,) = alps.evaluate(loaded, [path], seqlen=seqlen)
        assert record.windows == windows
        assert record.perplexity == pytest.approx(_naive(loaded.model, tokens, seqlen)[1])
    (first,) = alps.evaluate(loaded, [path], seqlen=8, windows=1)
    assert first.perplexity == pytest.approx(_naive(loaded.model, tokens[:8], 8)[1])
    with pytest.raises(ConfigError, match="has 32 tokens, too few for one window of 33"):
        alps.evaluate(loaded, [path], seqlen=33)
    with pytest.raises(ConfigError, match="longer than the 128"):
        alps.evaluate(loaded, [path], seqlen=129)


@pytest.mark.parametrize(
    ("seqlen", "windows"),
    [(8, 0), (8, -1), (1, None), (0, None)],
    ids=["no windows", "fewer than none", "one token", "no tokens"],
)
def test_windows_that_predict_nothing_are_refused(
    tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path: Path, seqlen: int, windows: int | None
) -> None:
    loaded = LoadedModel("tiny", tiny_model("llama"), word_tokenizer)
    with pytest.raises(ConfigError):
        alps.evaluate(loaded, [_text(tmp_path, "x" * 100)], seqlen=seqlen, windows=windows)


def test_a_model_in_training_is_evaluated_without_dropout(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path
) -> None:
    model = tiny_model("opt")
    plain, training = (
        alps.evaluate(LoadedModel("tiny", mode, word_tokenizer), [str(english_file)], seqlen=32, windows=8)[0].loss
        for mode in (model, tiny_model("opt").train())
    )
    assert training == plain


def test_every_text_gets_its_record_in_order(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path, tmp_path: Path
) -> None:
    loaded = LoadedModel("tiny", tiny_model("gpt2"), word_tokenizer)
    records = alps.evaluate(loaded, [str(english_file), _text(tmp_path, "a different text " * 9)], seqlen=32, windows=3)
    assert [(record.text, record.windows) for record in records] == [("english.txt", 3), ("text.txt", 3)]
    assert records[0].loss != records[1].loss
