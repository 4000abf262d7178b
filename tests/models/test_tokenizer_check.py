"""Tokenizer classes that give other tokens than tokenizer.json, or that are code of the checkpoint: said or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from alps.core.errors import UnsupportedModel
from alps.models.load import load_tokenizer

_OWN = {"AutoTokenizer": ["own.Own", None]}


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((stories / name).read_bytes())
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    return tmp_path


def _set(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    settings.pop("backend", None)
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None),
        ({"tokenizer_class": None}, None),
        ({"tokenizer_class": "GPT2Tokenizer"}, "its tokenizer class GPT2Tokenizer splits a test sentence into"),
        ({"tokenizer_class": "ByT5Tokenizer"}, "its tokenizer class ByT5Tokenizer splits a test sentence into"),
        (
            {"tokenizer_class": "OwnTokenizer"},
            "names the tokenizer class OwnTokenizer, which transformers does not have",
        ),
        (
            {"tokenizer_class": "LlamaTokenizer", "auto_map": _OWN},
            "of its own code, own.Own, which is never run: Llama",
        ),
    ],
)
def test_other_classes_are_said_in_one_warning(
    changes: dict[str, object], words: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _set(folder, **changes)
    with caplog.at_level(logging.WARNING, "alps"):
        tokenizer = load_tokenizer(str(folder))
    assert len(caplog.messages) == (words is not None) and (words or "") in caplog.text
    expected = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("It was 12 o'clock.", add_special_tokens=False).ids
    )
    is_other = words is not None and "splits" in words
    assert (tokenizer("It was 12 o'clock.", add_special_tokens=False).input_ids != expected) == is_other
    assert not (folder / "run").exists()


def test_a_class_of_own_code_alone_is_refused(folder: Path) -> None:
    _set(folder, tokenizer_class="OwnTokenizer", auto_map=_OWN)
    with pytest.raises(
        UnsupportedModel, match=r"a tokenizer of its own code, own\.Own, which is never run: if its tok"
    ):
        load_tokenizer(str(folder))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"tokenizer_class": 3}', '{"auto_map": 3}', '{"auto_map": {"AutoTokenizer": []}}']
)
def test_strange_settings_are_left_to_transformers(text: str, folder: Path) -> None:
    from alps.core.errors import AlpsError

    (folder / "tokenizer_config.json").write_text(text)
    try:
        load_tokenizer(str(folder))
    except AlpsError as error:
        assert "\n" not in str(error)
