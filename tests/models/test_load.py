"""Loading whole models: names that cannot be models, dtypes, and checkpoints that are not complete."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from alps.core.errors import AlpsError, CheckpointError, ConfigError, UnsupportedModel
from alps.models.load import check_model_path, load_model, load_tokenizer, looks_local, parse_dtype, quiet, readable


def test_dtypes_have_names() -> None:
    assert parse_dtype("auto") is None and parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match=r"^Dtype 'int3' is unknown: choose auto, float32, bfloat16, float16\.$"):
        parse_dtype("int3")


def test_what_looks_like_a_path_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert all(looks_local(name) for name in ("/a", "./a", "~/a", "a/b.gguf", "owner"))
    assert not looks_local("owner/model")
    (tmp_path / "owner" / "model").mkdir()
    assert looks_local("owner/model")


def test_names_that_cannot_be_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "packed.json").write_text("{}")
    (tmp_path / "weights.bin").write_text("")
    cases = {
        "model": "is neither an existing directory or GGUF file nor a hub name of the form owner/name",
        "a/b/c": "is neither an existing directory",
        str(tmp_path / "nowhere"): "does not exist: give a directory, a .gguf file or a hub name",
        str(tmp_path / "packed"): "is packed: use what `alps unpack",
        str(tmp_path): "has no config.json: it is not a Hugging Face checkpoint",
        str(tmp_path / "weights.bin"): f"a file but not a .gguf: give the directory of the checkpoint, '{tmp_path}'",
    }
    for name, complaint in cases.items():
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            check_model_path(name)
        assert complaint in str(caught.value)
    check_model_path("owner/model")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_model_is_loaded_in_evaluation_mode_and_in_its_dtype(
    tiny_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    dense = tiny_model("gpt2", torch.bfloat16)
    dense.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype)
    assert type(model) is type(dense) and not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (dtype or torch.bfloat16)
        assert torch.equal(parameter, dense.get_parameter(name).to(parameter.dtype)), name


def test_missing_and_misshapen_tensors_are_named(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    # Copies: older safetensors write over the file that the tensors are mapped from.
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file({**tensors, name: torch.zeros(3, 32)}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"has another shape of {name} than its config.json says"):
        load_model(str(tmp_path))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks 1 tensors of LlamaForCausalLM, first {name}: it is incomplete"):
        load_model(str(tmp_path))


def test_a_tokenizer_is_loaded_or_named_as_missing(word_tokenizer: Any, tmp_path: Path) -> None:
    word_tokenizer.save_pretrained(tmp_path / "with")
    tokenizer = load_tokenizer(str(tmp_path / "with"))
    assert tokenizer("ab c").input_ids == word_tokenizer("ab c").input_ids
    (tmp_path / "without").mkdir()
    with pytest.raises(ConfigError, match="without' cannot be loaded"):
        load_tokenizer(str(tmp_path / "without"))


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (ValueError("broken\n  badly!"), ConfigError, "Model 'm' cannot be loaded: broken badly."),
        (KeyError("llamma"), ConfigError, "Model 'm' cannot be loaded: KeyError 'llamma'."),
        (OSError(""), ConfigError, "Model 'm' cannot be loaded: OSError."),
        (ValueError(f"{'a' * 290}. {'b' * 50}"), ConfigError, f"Model 'm' cannot be loaded: {'a' * 290}."),
        (
            ValueError("Unrecognized configuration class <class 'a.b.T5Config'> for this kind of AutoModel: A."),
            UnsupportedModel,
            "Model 'm' has the configuration T5Config, for which transformers has no causal language model.",
        ),
        (ValueError("set trust_remote_code=True"), UnsupportedModel, None),
        (AlpsError("As it is."), AlpsError, "As it is."),
    ],
)
def test_errors_of_transformers_become_one_sentence(
    error: Exception, kind: type[AlpsError], sentence: str | None
) -> None:
    with pytest.raises(AlpsError) as caught, readable("m"):
        raise error
    assert type(caught.value) is kind and (sentence is None or str(caught.value) == sentence)
    assert "\n" not in str(caught.value)


def test_transformers_is_silent_for_a_while_and_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet():
        assert hf_logging.get_verbosity() == logging.ERROR and not hf_logging.is_progress_bar_enabled()
        raise RuntimeError
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (level, bars)
