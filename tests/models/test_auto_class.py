"""The class of transformers that loads a checkpoint: the text model, or the one that reads images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    MllamaForCausalLM,
    ViTConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from alps.models.auto_class import (
    auto_class,
    has_auto_class,
    is_composite,
    processor_files,
    reads_images,
    text_config,
)
from alps.models.lazy_weights import LazyWeights
from alps.models.load import load_model
from alps.models.meta_model import open_lazy_model
from helpers.vision import VISION, vision_model


def test_a_checkpoint_is_loaded_as_what_it_says_that_it_is() -> None:
    from transformers import Llama4Config

    assert auto_class(LlamaConfig()) is not AutoModelForImageTextToText
    assert auto_class(VISION["llava"][0]()) is AutoModelForImageTextToText
    # Of this one the causal language model is the text part alone.
    for name, whole in (("Llama4ForConditionalGeneration", True), ("Llama4ForCausalLM", False)):
        assert (auto_class(Llama4Config(architectures=[name])) is AutoModelForImageTextToText) == whole


def test_a_text_part_alone_is_loaded_by_the_class_that_it_names(tmp_path: Path) -> None:
    config = MllamaTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        pad_token_id=2,
    )
    model = MllamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    opened = open_lazy_model(str(tmp_path), None)
    assert isinstance(opened, LazyWeights)
    assert type(loaded) is type(opened.model) is MllamaForCausalLM and has_auto_class(loaded.config)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert not has_auto_class(ViTConfig(architectures=["LlamaForCausalLM"]))


def test_text_parts_of_composite_models_have_their_own_configuration(tiny_model: Callable[..., Any]) -> None:
    text, whole = tiny_model("llama"), vision_model("llava")
    assert text_config(text) is text.config and not is_composite(text)
    assert text_config(whole) is whole.config.text_config and is_composite(whole)
    assert text_config(nn.Linear(2, 2)) is None


def test_files_of_the_processor_are_those_of_composite_models(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    names = [path.name for path in processor_files(vision_model("llava"), str(tmp_path))]
    assert names == ["processor_config.json", "preprocessor_config.json"]
    assert processor_files(tiny_model("llama"), str(tmp_path)) == processor_files(vision_model("llava"), "") == []


def test_names_of_classes_say_whether_images_are_read() -> None:
    assert reads_images("LlavaForConditionalGeneration")
    assert not reads_images("LlamaForCausalLM") and not reads_images("Gemma3ForCausalLM") and not reads_images("")
