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
