"""Continuations of prompts: greedy, whatever the model's own settings, and none for what has no tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel
from alps.evaluation.sample_outputs import continue_prompts

_CPU = torch.device("cpu")


def test_prompts_are_continued_by_the_most_likely_tokens(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model = tiny_model("llama").train()
    # What would sample is not used.
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.eos_token_id = [1, 5]
    prompts = ["once upon", "a b"]
    pairs = continue_prompts(LoadedModel("m", model, word_tokenizer), prompts, 6, _CPU)
    assert [prompt for prompt, _ in pairs] == prompts and model.training
    model.eval()
    for prompt, text in pairs:
        ids = word_tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):
                token = model(input_ids=ids).logits[0, -1].argmax().view(1, 1)
                ids = torch.cat([ids, token], dim=1)
                if int(token) in (1, 5):
                    break
        assert text == word_tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"repetition_penalty": 3.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_no_setting_of_the_model_changes_the_samples(
    settings: dict[str, Any], tiny_model: Callable[..., Any], word_tokenizer: Any
) -> None:
    plain = continue_prompts(LoadedModel("m", tiny_model("llama"), word_tokenizer), ["once upon"], 6, _CPU)
    model = tiny_model("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert continue_prompts(LoadedModel("m", model, word_tokenizer), ["once upon"], 6, _CPU) == plain
    assert model.generation_config is own


def test_prompts_need_a_tokenizer_and_tokens(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model = tiny_model("llama")
    assert continue_prompts(LoadedModel("m", model, None), [], 6, _CPU) == []
    with pytest.raises(ConfigError, match=r"^Prompts need a tokenizer, and 'm' has none"):
        continue_prompts(LoadedModel("m", model, None), ["a"], 6, _CPU)
    with pytest.raises(ConfigError, match=r"^Prompt '' has no tokens: write a few words\.$"):
        continue_prompts(LoadedModel("m", model, word_tokenizer), [""], 6, _CPU)
