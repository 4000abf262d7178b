"""Tests of smaller models that are built without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM

from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrunk_model import check_target, empty_shrunk_model
from alps.models.structure import Target
from helpers.decoders import decoder
from helpers.shrinking import check_plain


def randomised(kind: str, **fields: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = AutoConfig.for_model(kind, **{**sizes, "num_attention_heads": 4, "num_key_value_heads": 1, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return model.eval()


def test_llama_with_three_of_four_heads_is_a_mistral(ids: Tensor, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model = randomised("llama", rope_parameters=rope, max_position_embeddings=512)
    target = Target(heads=3, mlp_width=40, kept_blocks=(0, 1, 3))
    assert type(empty_shrunk_model(model, find_blocks(model), target)) is MistralForCausalLM
    check_plain(model, target, ids[:3], tmp_path)


_QWEN3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0, 2]}
_VARIANTS: list[tuple[str, dict[str, Any], Target]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, Target(mlp_width=20, heads=2)),
    ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2, "pad_token_id": 0}, Target(heads=2, kv_heads=1)),
    ("phi", {"num_key_value_heads": 4}, Target(heads=3)),
    ("ernie4_5", {"use_bias": True, "num_key_value_heads": 2}, Target(heads=2, mlp_width=20)),
    ("qwen3_moe", {**_QWEN3, "head_dim": 8}, Target(mlp_width=20, experts=3, heads=3, kept_blocks=(0, 1, 3))),
    (
        "glm4_moe",
        {
            "use_qk_norm": True,
            "attention_bias": True,
            "pad_token_id": 0,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        Target(heads=3),
    ),
    ("opt", {"enable_bias": False, "ffn_dim": 48}, Target(mlp_width=20)),
    ("gpt_neox", {"attention_bias": False}, Target(mlp_width=20, kept_blocks=(1, 2))),
    ("starcoder2", {"use_bias": False}, Target(mlp_width=20, heads=3)),
    ("mistral", {"head_dim": 12}, Target(heads=3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields", "target"), _VARIANTS)
def test_biases_and_norms_that_a_configuration_adds_are_sliced(
    kind: str, fields: dict[str, Any], target: Target, ids: Tensor, tmp_path: Path
) -> None:
    check_plain(randomised(kind, **fields), target, ids[:3], tmp_path)


@pytest.mark.slow
def test_grouped_experts_keep_their_groups(ids: Tensor, tmp_path: Path) -> None:
    """Two of four experts of each of four groups; a token goes to two groups."""
    sizes = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    mixture = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 2}
    more = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    for kind, method in (("deepseek_v3", {}), ("deepseek_v2", {"topk_method": "group_limited_greedy"})):
        model = randomised(kind, **sizes, **mixture, **more, **method)
        target = Target(experts=8, expert_width=8, heads=2, kept_blocks=(0, 1, 3))
        check_plain(model, target, ids[:3], tmp_path / kind)


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target(mlp_width=128, heads=4, kept_blocks=(0, 1, 2, 4)), Target(kv_heads=3)])
def test_a_trained_model_becomes_plain(target: Target, stories: Path, tmp_path: Path) -> None:
    """Three of four KV heads have six query heads, which do not divide the hidden size of 64."""
    ids = torch.randint(2, 500, (3, 64), generator=torch.Generator().manual_seed(0))
    check_plain(AutoModelForCausalLM.from_pretrained(stories), target, ids, tmp_path)


def test_the_model_has_no_weights_and_the_settings_of_its_source() -> None:
    model = decoder("llama", torch.bfloat16)
    model.generation_config.temperature = 0.7
    small: Any = empty_shrunk_model(model, find_blocks(model), Target(mlp_width=16, heads=2, kept_blocks=(0, 2)))
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in small.parameters())
    assert small.generation_config.temperature == 0.7
    assert not small.training and len(find_blocks(small)) == 2
    assert small.config.dtype == torch.bfloat16


def test_scores_that_depend_on_the_number_of_a_block_keep_it_from_moving() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True)
    model = AutoModelForCausalLM.from_config(config)
    check_target(model, find_blocks(model), Target(kept_blocks=(0, 1)))
    with pytest.raises(UnsupportedModel, match=r"transformer\.h\.2 would be of another kind as block 1"):
        check_target(model, find_blocks(model), Target(kept_blocks=(0, 2)))


def test_blocks_that_transformers_builds_in_other_shapes_are_refused() -> None:
    """Phi gives the norms of queries and keys the size of a head that follows from the hidden size."""
    model = randomised("phi", qk_layernorm=True, num_key_value_heads=4)
    with pytest.raises(UnsupportedModel, match=r"q_layernorm.weight as \[10\] and not as \[8\]: models of type 'phi'"):
        check_target(model, find_blocks(model), Target(heads=3))
