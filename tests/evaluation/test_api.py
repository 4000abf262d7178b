"""Measurements from Python: models by name or in memory, and results that notebooks can show."""

from __future__ import annotations

from pathlib import Path

import pytest

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import load
from alps.reporting.records import ComparisonRecord


def test_names_do_and_a_bare_model_is_refused_in_a_sentence(stories: Path, english_file: Path) -> None:
    texts = [str(english_file)]
    (named,) = alps.evaluate(stories, texts, seqlen=64, windows=3, reference=str(stories))
    (loaded,) = alps.evaluate(load(str(stories)), texts, seqlen=64, windows=3)
    assert named.loss == loaded.loss and isinstance(named, ComparisonRecord) and named.kl == 0
    with pytest.raises(ConfigError, match=r"A LlamaForCausalLM cannot be measured without its tokenizer"):
        alps.evaluate(load(str(stories)).model, texts, seqlen=64, windows=3)


def test_one_text_needs_no_list(stories: Path, english_file: Path) -> None:
    loaded = load(str(stories))
    (several,) = alps.evaluate(loaded, [english_file], seqlen=64, windows=3)
    for text in (english_file, str(english_file)):
        assert [record.loss for record in alps.evaluate(loaded, text, seqlen=64, windows=3)] == [several.loss]
