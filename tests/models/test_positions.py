"""Lengths that a model takes: limits under every name, prompts with their continuations, and tokens without a row."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    MptForCausalLM,
    XLNetConfig,
)

from alps.core.errors import ConfigError
from alps.inference.text_generation import generate_text
from alps.models.positions import check_prompt, check_window, position_limit
from helpers.log_messages import log_messages


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(max_position_embeddings=7),
        GPT2Config(n_positions=7),
        MptConfig(max_seq_len=7),
        BloomConfig(seq_length=7),
        *(SimpleNamespace(**{name: 7}) for name in ("max_sequence_length", "max_seq_length", "n_ctx")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_limit_has_many_names(config: Any) -> None:
    assert position_limit(config) == 7


def test_some_models_have_no_limit() -> None:
    for config in (XLNetConfig(), MambaConfig(), LlamaConfig(max_position_embeddings=0), SimpleNamespace(n_ctx=True)):
        assert position_limit(config) is None


def _mpt() -> Any:
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=16, vocab_size=64)
    return MptForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mpt"])
def test_models_with_tables_of_positions_refuse_what_fails(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = _mpt() if kind == "mpt" else tiny_model(kind)
    limit = position_limit(model.config)
    assert limit in (16, 128)
    ids = torch.full((1, 10), 5)
    check_prompt(model, ids, limit - 10)
    with pytest.raises(ConfigError, match=f"^10 tokens of the prompt and {limit} new ones are more than the {limit} "):
        check_prompt(model, ids, limit)
    # The refusal is no mere caution.
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 2), 5))


def test_rotary_models_go_on_with_a_warning(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model = tiny_model("llama")
    with log_messages() as logged:
        generate_text(model, word_tokenizer, "once", 2)
        assert logged == []
        result = generate_text(model, word_tokenizer, "once " * 25, 8)
    assert result.tokens >= 1
    assert logged == [
        "125 tokens of the prompt and 8 new ones are more than the 128 this model takes: what follows them is of "
        "little use."
    ]


def test_tokens_without_an_embedding_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="token 64, outside the model's vocabulary of 64"):
        check_prompt(tiny_model("gpt2"), torch.tensor([[1, 64]]), 1)


def test_a_tokenizer_gives_a_hint_where_the_model_has_no_limit() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace())
    with log_messages() as logged:
        for length in (8, 10**30):
            check_window(model, SimpleNamespace(model_max_length=length), 8)
        assert logged == []
        check_window(model, SimpleNamespace(model_max_length=7), 8)
    assert logged == ["Windows of 8 tokens are longer than the 7 that the model's tokenizer names."]
