"""A model with its tokenizer: windows that fit it, weights that identify it, and what cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel, load, open_model
from alps.data.text_sources import load_text
from alps.data.windows import Windows, cut_evaluation_windows, draw_calibration_windows
from helpers.log_messages import log_messages

Tiny = Callable[..., Any]


@pytest.fixture
def loaded(tiny_model: Tiny, word_tokenizer: Any) -> LoadedModel:
    return LoadedModel("tiny", tiny_model("llama"), word_tokenizer)


def test_calibration_windows_are_those_of_the_text(loaded: LoadedModel, english_file: Path) -> None:
    text = load_text(str(english_file), "calibration")
    windows = loaded.calibration(text, 5, 16, 3)
    assert torch.equal(windows.ids, draw_calibration_windows(text, loaded.tokenizer, samples=5, seqlen=16, seed=3).ids)
    assert windows.ids.shape == (5, 16) and repr(loaded) == "LoadedModel('tiny', LlamaForCausalLM)"


def test_evaluation_windows_are_consecutive_and_within_the_vocabulary(loaded: LoadedModel, english_file: Path) -> None:
    windows = loaded.evaluation(str(english_file), 16, 4)
    text = load_text(str(english_file), "evaluation")
    assert torch.equal(windows.ids, cut_evaluation_windows(text, loaded.tokenizer, 16, 4).ids)
    loaded.model.resize_token_embeddings(20)
    with pytest.raises(ConfigError, match=r"outside the model's vocabulary of 20: the tokenizer does not belong"):
        loaded.evaluation(str(english_file), 16, 4)


def test_windows_that_cannot_be_made_are_refused(loaded: LoadedModel, english_file: Path, tiny_model: Tiny) -> None:
    text, bare = load_text(str(english_file), "calibration"), LoadedModel("bare", tiny_model("gpt2"), None)
    for call, complaint in (
        (lambda: loaded.calibration(text, 0, 16, 0), "0 samples of seqlen 16 hold no tokens"),
        (lambda: loaded.calibration(text, 2, 129, 0), "longer than the 128 this model takes: lower --seqlen"),
        (lambda: bare.calibration(text, 2, 16, 0), "Calibration by text needs the model's tokenizer"),
        (lambda: bare.evaluation(str(english_file), 16, 1), "Evaluation on a text needs a tokenizer, and 'bare' has"),
        (lambda: bare.check_length(129), "longer than the 128 this model takes"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert complaint in str(caught.value)


def test_token_ids_of_a_caller_are_checked(loaded: LoadedModel, ids: Tensor) -> None:
    windows = loaded.token_ids(ids.to(torch.int32))
    assert windows.ids.dtype == torch.int64 and torch.equal(windows.ids, ids) and windows.available == len(ids)
    for wrong in (ids.float(), ids[0], ids[:0], ids[:, :1], ids[None], ids.to(torch.complex64)):
        with pytest.raises(ConfigError, match="give integers of shape"):
            loaded.token_ids(wrong)
    with pytest.raises(ConfigError, match="longer than the 128"):
        loaded.token_ids(torch.zeros(1, 129, dtype=torch.int64))
    for value in (-1, 64):
        with pytest.raises(ConfigError, match=f"run from {min(value, 0)} to {max(value, 0)}, outside"):
            loaded.check_ids(Windows(torch.tensor([[0, value]]), "w", 1))


def test_windows_of_another_tokenizer_are_refused(
    loaded: LoadedModel, stories: Path, tiny_model: Tiny, english_file: Path
) -> None:
    windows = loaded.evaluation(str(english_file), 16, 3)
    loaded.check_same(windows, str(english_file), 3)
    LoadedModel("without", tiny_model("gpt2"), None).check_same(windows, str(english_file), 3)
    with pytest.raises(ConfigError, match=r"tokenizer of '.*hf' cuts 'english\.txt' into other tokens"):
        load(str(stories)).check_same(windows, str(english_file), 3)


def test_weights_identify_a_model_in_memory_and_files_one_that_is_not(tiny_model: Tiny, tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    assert LoadedModel("a", model, None).identity() == LoadedModel("b", other, None).identity()
    with torch.no_grad():
        other.model.norm.weight[3] += 1
    assert LoadedModel("a", model, None).identity() != LoadedModel("b", other, None).identity()


def test_a_packed_directory_and_one_without_a_tokenizer_are_loaded(
    tiny_model: Tiny, word_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    alps.prune(model, pattern="2:4", method="magnitude", measure_error=False)
    model.save_pretrained(tmp_path / "dense")
    assert load(tmp_path / "dense").tokenizer is None
    word_tokenizer.save_pretrained(tmp_path / "dense")
    alps.pack(tmp_path / "dense", tmp_path / "packed")
    packed = load(tmp_path / "packed", "bfloat16")
    assert packed.name == str(tmp_path / "packed") and packed.tokenizer("ab").input_ids
    assert packed.model.dtype == torch.bfloat16 and not packed.model.training
    with pytest.raises(ConfigError, match=r"semi_structured is for packed layers|GPU"):
        load(tmp_path / "dense", semi_structured=True)


def test_a_model_is_opened_without_its_weights_or_loaded_with_a_message(
    tiny_model: Tiny, word_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with log_messages() as messages:
        opened = open_model(str(tmp_path))
    assert opened.store is not None and messages == [] and len(opened.blocks()) == 3
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    monkeypatch.setattr("alps.data.loaded_model.open_lazy_model", lambda *_: "its files are odd")
    with log_messages() as messages:
        whole = open_model(str(tmp_path))
    assert whole.store is None and len(messages) == 1 and "whole: its files are odd" in messages[0]
    monkeypatch.setattr("alps.data.loaded_model.load_model", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ConfigError, match="does not fit into memory, and has to be loaded whole: its files are odd"):
        open_model(str(tmp_path))
