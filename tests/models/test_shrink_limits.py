"""Tests of the numbers of units that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from alps.core.errors import AlpsError, ConfigError, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_limits import needs_mistral
from alps.models.shrunk_model import check_target
from alps.models.structure import Target, read_structure
from helpers.decoders import decoder


def model_of(kind: str, **fields: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, "num_attention_heads": 4, **fields}))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Target(mlp_width=0), ConfigError, "0 MLP channels cannot be kept of 48"),
        (Target(mlp_width=49), ConfigError, "49 MLP channels cannot be kept of 48"),
        (
            Target(heads=3),
            ConfigError,
            "3 query heads cannot share 2 KV heads equally, at most 2 on each: choose one of 2, 4",
        ),
        (Target(heads=4, kv_heads=1), ConfigError, "4 query heads cannot share 1 KV heads equally, at most 2 on each"),
        (Target(kv_heads=3), ConfigError, "6 query heads cannot be kept of 4"),
        (Target(kept_blocks=()), ConfigError, r"Blocks \[\] cannot be kept of a model with blocks 0 to 3"),
        (Target(kept_blocks=(0, 4)), ConfigError, "cannot be kept"),
        (Target(kept_blocks=(1, 0)), ConfigError, "in ascending order"),
        (Target(kept_blocks=(1, 1)), ConfigError, "name each once"),
    ],
)
def test_numbers_out_of_range_are_refused(target: Target, error: type[AlpsError], message: str) -> None:
    model = decoder("llama")
    with pytest.raises(error, match=message):
        check_target(model, find_blocks(model), target)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 1}, "no 'gemma2' model with 3 heads, which do not divide"),
        ("llama", {"attention_bias": True, "num_key_value_heads": 1}, "no 'llama' model with 3 heads"),
        (
            "gpt2",
            {"n_embd": 32},
            "Heads of 'gpt2' models cannot be removed: transformers derives .* size; MLP channels and blocks",
        ),
        ("olmo2", {}, "Heads of 'olmo2' models cannot be removed: its norms of queries and keys run over all heads"),
    ],
)
def test_heads_that_a_family_cannot_lose_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    model = model_of(kind, **fields)
    with pytest.raises(UnsupportedModel, match=message):
        check_target(model, find_blocks(model), Target(heads=3))


def test_llama_needs_mistral_for_heads_that_do_not_divide_the_hidden_size() -> None:
    model = model_of("llama", num_key_value_heads=1)
    structure = read_structure(model, find_blocks(model))
    assert needs_mistral(model, structure, Target(heads=3))
    assert not needs_mistral(model, structure, Target(heads=2))
    assert not needs_mistral(model, structure, Target(mlp_width=8))


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("llama", Target(experts=2), "The model has no experts that could be removed"),
        ("mixtral", Target(mlp_width=8), "The model has no MLP channels that could be removed"),
        ("mixtral", Target(experts=1), "1 experts are too few, since a token is sent to 2: keep 2 or more"),
        ("mixtral", Target(experts=5), "5 experts cannot be kept of 4"),
        ("mixtral", Target(expert_width=20), "Experts with 20 channels cannot be multiplied in groups"),
    ],
)
def test_experts_that_a_model_cannot_lose_are_refused(kind: str, target: Target, message: str) -> None:
    model = decoder(kind)
    with pytest.raises(ConfigError, match=message):
        check_target(model, find_blocks(model), target)


def test_groups_of_experts_lose_equally() -> None:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    mixture = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 6}
    model = model_of("deepseek_v3", **sizes, **mixture, moe_intermediate_size=16, first_k_dense_replace=1)
    blocks = find_blocks(model)
    structure = read_structure(model, blocks)
    assert (structure.expert_groups, structure.groups_per_token, structure.experts_per_token) == (4, 2, 6)
    check_target(model, blocks, Target(experts=12))
    with pytest.raises(
        ConfigError, match="10 experts cannot be kept of 16 in 4 groups of equal size: choose a multiple"
    ):
        check_target(model, blocks, Target(experts=10))
    with pytest.raises(ConfigError, match="8 experts are too few, since a token is sent to 6: keep 12 or more"):
        check_target(model, blocks, Target(experts=8))


def test_the_experts_of_jetmoe_stay() -> None:
    model = decoder("jetmoe")
    with pytest.raises(UnsupportedModel, match="its attention has as many experts as its MLP; blocks can be removed"):
        check_target(model, find_blocks(model), Target(experts=2))


def test_widths_without_a_field_are_refused() -> None:
    model = decoder("bloom")
    with pytest.raises(UnsupportedModel, match="its configuration has no field for the width of the MLP"):
        check_target(model, find_blocks(model), Target(mlp_width=64))
