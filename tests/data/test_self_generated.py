"""Calibration without text: the cache of sampled windows, where a text begins, mixes, and the commands with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.core.errors import ConfigError
from alps.data import self_generated as generated
from alps.data import tensor_cache
from alps.data.loaded_model import LoadedModel
from alps.data.mixture import load_calibration
from alps.data.sampling import TemperatureSchedule, sample_windows
from alps.data.self_generated import first_token, forbidden_tokens, generate_windows
from alps.data.text_sources import load_text
from alps.data.windows import Windows, draw_calibration_windows
from helpers.command_line import run_alps
from helpers.log_messages import log_messages


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sampled windows, empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ALPS_CACHE", str(folder))
    return folder / "generated"


@pytest.fixture
def tiny(tiny_model: Callable[..., Any], word_tokenizer: Any) -> LoadedModel:
    return LoadedModel("tiny", tiny_model("llama"), word_tokenizer)


def refuse(**_: Any) -> Any:
    raise AssertionError("the model was called")


def windows(
    loaded: LoadedModel, samples: int = 3, seqlen: int = 12, seed: int = 0, messages: list[str] | None = None
) -> Tensor:
    with log_messages() as logged:
        ids = generate_windows(loaded.model, loaded.tokenizer, samples=samples, seqlen=seqlen, seed=seed).ids
    if messages is not None:
        messages += logged
    return ids


def test_the_second_time_the_model_is_not_called(
    tiny: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    first = windows(tiny, messages=messages)
    assert len(messages) == 1 and messages[0].startswith("Sampling 3 windows of 12 tokens from the dense model")
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    monkeypatch.setattr(tiny.model, "forward", refuse)
    assert torch.equal(windows(tiny, messages=messages), first) and len(messages) == 1
    with pytest.raises(AssertionError, match="the model was called"):
        windows(tiny, seed=1)


def test_whatever_changes_the_windows_misses_the_cache(
    tiny: LoadedModel, tiny_model: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows(tiny)
    windows(LoadedModel("another name", tiny_model("llama"), tiny.tokenizer))
    assert len(list(cache.iterdir())) == 1
    windows(tiny, samples=4)
    windows(tiny, seqlen=13)
    windows(tiny, seed=1)
    windows(LoadedModel("tiny", tiny_model("llama", torch.bfloat16), tiny.tokenizer))
    windows(LoadedModel("tiny", tiny.model, None))
    assert len(list(cache.iterdir())) == 6
    for package in ("torch", "transformers"):
        monkeypatch.setattr(
            generated, "version", lambda name, changed=package: "9" if name == changed else version(name)
        )
        windows(tiny)
    hot = TemperatureSchedule(9.0, 9.0, 1)
    monkeypatch.setattr(generated, "TemperatureSchedule", lambda: hot)
    windows(tiny)
    assert len(list(cache.iterdir())) == 9


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the low byte of the last token
    path.write_bytes(content)


def _another(path: Path) -> None:
    from safetensors.torch import save_file

    ids = torch.zeros(2, 12, dtype=torch.int64)
    save_file({"ids": ids}, path, metadata={"sha256": Windows(ids, "self", 2).sha256})


def _unnamed(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(3, 12, dtype=torch.int64)}, path)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip, _another, _unnamed, lambda path: path.write_bytes(b""), lambda path: path.write_text("{}")],
    ids=["truncated", "one bit", "another shape", "another tensor", "empty", "not safetensors"],
)
def test_a_damaged_file_is_made_again(
    tiny: LoadedModel, cache: Path, damage: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = windows(tiny)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    damage(path)
    assert path.read_bytes() != sound
    messages: list[str] = []
    assert torch.equal(windows(tiny, messages=messages), first) and len(messages) == 1
    assert path.read_bytes() == sound and list(cache.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
def test_a_file_appears_whole_or_not_at_all(
    tiny: LoadedModel, cache: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of")
        assert [file.suffix for file in cache.iterdir()] != [".safetensors"]
        raise failure

    expected = sample_windows(
        tiny.model, 0, samples=3, seqlen=12, seed=0, forbidden=forbidden_tokens(tiny.tokenizer, 64, 0)
    )
    monkeypatch.setattr(tensor_cache, "save_file", half)
    messages: list[str] = []
    if isinstance(failure, OSError):
        assert torch.equal(windows(tiny, messages=messages), expected)
        assert messages[1] == f"The sampled windows cannot be kept in '{cache}': No space left on device."
    else:
        with pytest.raises(KeyboardInterrupt):
            windows(tiny)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_costs_a_line_and_no_windows(tiny: LoadedModel, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    messages: list[str] = []
    assert windows(tiny, messages=messages).shape == (3, 12)
    assert len(messages) == 2 and messages[1].startswith(f"The sampled windows cannot be kept in '{cache}': ")


class _Words:
    """A tokenizer that is a vocabulary and special tokens."""

    def __init__(self, vocabulary: dict[str, int], special: tuple[str, ...], bos: str | None, eos: str | None) -> None:
        self._vocabulary = vocabulary
        self.bos_token_id = None if bos is None else vocabulary[bos]
        self.eos_token_id = None if eos is None else vocabulary[eos]
        self.all_special_ids = [vocabulary[word] for word in (bos, eos) if word is not None]
        self.added_tokens_decoder = {vocabulary[w]: SimpleNamespace(special=w in special) for w in (*special, "word")}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


_CHAT = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "word": 3, "<reserved>": 5}
_LLAMA = {"<s>": 1, "</s>": 2, "word": 3, "<pad>": 4}


@pytest.mark.parametrize(
    ("tokenizer", "first", "forbidden"),
    [
        # Ids that the vocabulary leaves out are forbidden, too: the models of this test have 8.
        (_Words(_CHAT, ("<|im_start|>", "<reserved>"), "<|im_start|>", "<|im_end|>"), 0, [1, 2, 4, 5, 6, 7]),
        (_Words(_LLAMA, ("<s>", "</s>", "<pad>"), "<s>", "</s>"), 1, [0, 4, 5, 6, 7]),
        (_Words(_LLAMA, ("</s>",), None, "</s>"), 2, [0, 5, 6, 7]),
        (_Words({"<|end_of_text|>": 4, "<s>": 1, "word": 3}, ("<|end_of_text|>",), "<s>", "<s>"), 1, [0, 2, 5, 6, 7]),
    ],
    ids=["chat", "llama", "no beginning", "end of text"],
)  # fmt: skip
def test_windows_begin_where_a_text_does_and_hold_only_text(tokenizer: Any, first: int, forbidden: list[int]) -> None:
    assert first_token(SimpleNamespace(), tokenizer) == first  # type: ignore[arg-type]
    assert forbidden_tokens(tokenizer, 8, first).tolist() == forbidden


def test_without_a_tokenizer_the_configuration_says_where_a_text_begins(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.config.bos_token_id = 7
    ids = LoadedModel("tiny", model, None).calibration(load_calibration("self", 2), 2, 8, 0).ids
    assert torch.equal(ids, sample_windows(model, 7, samples=2, seqlen=8, seed=0)) and ids[:, 0].tolist() == [7, 7]
    model.config.bos_token_id = None
    with pytest.raises(ConfigError, match="names none: calibrate with a text"):
        LoadedModel("tiny", model, None).calibration(load_calibration("self", 2), 2, 8, 0)


def test_a_tokenizer_of_another_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    tokenizer = _Words({"<|endoftext|>": 64, "word": 3}, (), None, None)
    with pytest.raises(ConfigError, match=r"Token 64, .* outside the model's vocabulary of 64"):
        generate_windows(tiny_model("llama"), tokenizer, samples=2, seqlen=8, seed=0)


def test_a_mix_holds_what_its_parts_give_alone(tiny: LoadedModel, english_file: Path, word_tokenizer: Any) -> None:
    mix = load_calibration(f"{english_file}:0.7,self:0.3", 10)
    drawn = tiny.calibration(mix, 10, 16, 3)
    seeds = mix.seeds(3)
    text = draw_calibration_windows(
        load_text(str(english_file), "calibration"), word_tokenizer, samples=7, seqlen=16, seed=seeds[0]
    )
    own = generate_windows(tiny.model, word_tokenizer, samples=3, seqlen=16, seed=seeds[1])
    assert sorted(drawn.ids.tolist()) == sorted([*text.ids.tolist(), *own.ids.tolist()])
    assert drawn.parts == (("english.txt", 7), ("self", 3)) and drawn.source == "english.txt:0.7,self:0.3"
    assert torch.equal(drawn.ids, tiny.calibration(mix, 10, 16, 3).ids)
    assert not torch.equal(drawn.ids, tiny.calibration(mix, 10, 16, 4).ids)


def test_a_text_that_is_too_short_is_told_before_sampling(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.setattr(tiny.model, "forward", refuse)
    with pytest.raises(ConfigError, match=r"'short\.txt' has 6 tokens"):
        tiny.calibration(load_calibration(f"self:1,{tmp_path / 'short.txt'}:1", 4), 4, 16, 0)


def test_a_text_in_a_mix_needs_a_tokenizer(tiny: LoadedModel, english_file: Path) -> None:
    bare = LoadedModel("tiny", tiny.model, None)
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        bare.calibration(load_calibration(f"self:1,{english_file}:1", 4), 4, 16, 0)
    with pytest.raises(ConfigError, match="longer than the 128"):
        bare.calibration(load_calibration("self", 4), 4, 129, 0)


def test_pruning_in_memory_samples_the_dense_model(tiny: LoadedModel, tiny_model: Callable[..., Any]) -> None:
    expected = windows(LoadedModel("tiny", tiny_model("llama"), tiny.tokenizer), 4, 16, 2)
    report = alps.prune(
        tiny.model,
        sparsity=0.5,
        method="wanda",
        calibration="self",
        tokenizer=tiny.tokenizer,
        samples=4,
        seqlen=16,
        seed=2,
    )
    assert report.calibration is not None and report.calibration.seed == 2
    assert report.calibration.sha256 == Windows(expected, "self", 4).sha256
    assert [part.model_dump(exclude_none=True) for part in report.calibration.parts] == [
        {"source": "self", "windows": 4}
    ]


def test_the_commands_sample_and_mix(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    english_file: Path,
    tmp_path: Path,
) -> None:
    sizes = ("--pattern", "2:4", "--method", "wanda", "--samples", 5, "--seqlen", 32)

    def prune(out: str, calibration: str) -> tuple[str, Any]:
        assert run_alps(monkeypatch, "prune", stories, tmp_path / out, *sizes, "--calibration", calibration) == 0
        return capsys.readouterr().err, json.loads((tmp_path / out / "report.json").read_text())["calibration"]

    lines, used = prune("own", "self")
    assert lines.count("Sampling 5 windows of 32 tokens") == 1 and "sampling calibration windows: 31/31" in lines
    assert used["source"] == "self" and used["parts"] == [_part("self", 5)]
    lines, again = prune("again", "self")
    assert "ampling" not in lines and again == used
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("own", "again")]
    assert weights[0] == weights[1]

    lines, used = prune("mixed", f"{english_file}:0.5,self:0.5")
    assert "Sampling 2 windows of 32 tokens" in lines and used["windows"] == 5
    assert used["source"] == "english.txt:0.5,self:0.5"
    assert used["parts"] == [_part("english.txt", 3, "plain text", 1), _part("self", 2)]
    settings = tmp_path / "mixed" / "alps.yaml"
    assert run_alps(monkeypatch, "prune", stories, tmp_path / "same", "--config", settings) == 0
    assert json.loads((tmp_path / "same" / "report.json").read_text())["calibration"] == used


def _part(source: str, windows: int, kind: str | None = None, documents: int | None = None) -> dict[str, Any]:
    return {"source": source, "windows": windows, "format": kind, "documents": documents}
