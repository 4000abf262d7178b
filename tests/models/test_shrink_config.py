"""Tests of configurations of smaller models, as objects and as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_config import edit_config_text, shrunk_config
from alps.models.structure import Target, read_structure
from helpers.decoders import decoder
from helpers.shrinking import plain_fields

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
# config.json as older releases have written it: derived fields are not there.
_OLD_LLAMA = """{
  "architectures": ["LlamaForCausalLM"],
  "model_type":  "llama",
  "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 1,
  "rope_theta": 5000.0,
  "rope_scaling": null,
  "torch_dtype": "float32",
  "own_field": [1,2,  3]
}
"""


def model_of(text: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(text)))
    return model


def edit(text: str, target: Target) -> tuple[str, Any]:
    """Return the edited text, and the configuration of the smaller model."""
    model = model_of(text)
    structure = read_structure(model, find_blocks(model))
    return edit_config_text(text, model, structure, target), shrunk_config(model, structure, target)


def test_head_dim_is_added_to_a_file_that_leaves_it_out() -> None:
    edited, config = edit(_OLD_LLAMA, Target(heads=2, mlp_width=40))
    assert edited == _OLD_LLAMA.replace('ate_size": 48', 'ate_size": 40').replace(
        '"num_attention_heads": 4', '"num_attention_heads": 2'
    ).replace("3]\n", '3],\n  "head_dim": 8\n')
    assert plain_fields(AutoConfig.for_model(**json.loads(edited))) == plain_fields(config)
    assert (config.head_dim, config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (8, 1, 5000.0)


def test_llama_with_other_heads_is_written_as_mistral() -> None:
    edited, config = edit(_OLD_LLAMA, Target(heads=3))
    assert type(config) is MistralConfig and config.architectures == ["MistralForCausalLM"]
    fields = json.loads(edited)
    assert {name: value for name, value in fields.items() if json.loads(_OLD_LLAMA).get(name, 0) != value} == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_attention_heads": 3,
        "head_dim": 8,
        "sliding_window": None,
        "max_position_embeddings": 2048,
        "transformers_version": transformers.__version__,
    }
    read = AutoConfig.for_model(**fields)
    assert type(read) is MistralConfig and read.own_field == [1, 2, 3]
    assert plain_fields(read) == {**plain_fields(config), "own_field": [1, 2, 3]}


def test_lists_that_count_blocks_lose_the_same_entries() -> None:
    kept = Target(kept_blocks=(0, 3))
    cases: dict[str, dict[str, Any]] = {
        "qwen2": {"max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]},
        "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
        "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
        "gpt_neo": {"attention_layers": ["global", "local"], "attention_types": [[["global", "local"], 1]]},
        "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
        "llama4": {"moe_layers": [1], "no_rope_layers": [1, 0]},
        "deepseek_v3": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
        "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    }
    for kind, expected in cases.items():
        model = decoder(kind)
        config = shrunk_config(model, read_structure(model, find_blocks(model)), kept)
        assert config.num_hidden_layers == 2
        assert {name: getattr(config, name) for name in expected} == expected


def test_lists_are_added_where_they_do_not_follow_from_a_file() -> None:
    """Qwen2 derives the kinds of its blocks from the first one with a window."""
    text = json.dumps(
        {**_SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        indent=2,
    )
    edited, config = edit(text, Target(kept_blocks=(0, 2)))
    assert "layer_types" not in json.loads(edited) and json.loads(edited)["max_window_layers"] == 1
    assert AutoConfig.for_model(**json.loads(edited)).layer_types == config.layer_types
    text = json.dumps({**_SIZES, "model_type": "cohere2", "sliding_window": 6, "sliding_window_pattern": 2}, indent=2)
    edited, config = edit(text, Target(kept_blocks=(1, 3)))
    assert json.loads(edited)["layer_types"] == ["full_attention"] * 2 == config.layer_types


def test_older_names_of_fields_are_kept() -> None:
    text = '{"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "num_hidden_layers": 3, "n_head": 4}'
    edited, config = edit(text, Target(mlp_width=64, kept_blocks=(0, 2)))
    assert edited == text.replace('layers": 3', 'layers": 2').replace("4}", '4, "n_inner": 64}')
    assert (config.n_layer, config.n_inner) == (2, 64)


def test_the_source_does_not_change() -> None:
    model = model_of(_OLD_LLAMA)
    before = model.config.to_dict()  # type: ignore[operator, union-attr]
    model.config.dtype = torch.bfloat16
    config = shrunk_config(model, read_structure(model, find_blocks(model)), Target(heads=3, kept_blocks=(1,)))
    assert config.dtype == torch.bfloat16 and config._attn_implementation == model.config._attn_implementation  # type: ignore[union-attr]
    model.config.dtype = before["dtype"]
    assert model.config.to_dict() == before  # type: ignore[operator, union-attr]


def test_what_transformers_refuses_is_one_sentence() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES, attention_bias=True))
    structure = read_structure(model, find_blocks(model))
    model.config.layer_types = ["no such attention"] * 4
    with pytest.raises(ConfigError, match=r"^transformers refuses a 'llama' model with these numbers \(.*\)\.$"):
        shrunk_config(model, structure, Target(mlp_width=8))


def test_parts_of_larger_checkpoints_are_refused() -> None:
    model = model_of(_OLD_LLAMA)
    structure = read_structure(model, find_blocks(model))
    text = '{"model_type": "llava", "text_config": {"model_type": "llama"}}'
    with pytest.raises(UnsupportedModel, match="holds a 'llava' model, of which 'llama' is a part"):
        edit_config_text(text, model, structure, Target(mlp_width=8))
