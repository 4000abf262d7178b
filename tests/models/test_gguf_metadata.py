"""Hyper-parameters of GGUF files: what a configuration takes over, and what is refused by its key."""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Starcoder2Config,
)

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.gguf_metadata import GgufMetadata, complete_config, read_gguf_metadata
from alps.models.load import load_model
from helpers.gguf_files import write_llama

IDS = torch.arange(3, 403).remainder(512)[None]


@pytest.fixture(scope="module")
def llama(stories: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(stories).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def _with_rope(model: LlamaForCausalLM, **rope: Any) -> LlamaForCausalLM:
    config: Any = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear, old": ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "yarn with its numbers": (
        YARN | {"rope.scaling.attn_factor": 0.5, "rope.scaling.yarn_beta_fast": 16.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 0.5 * 1.138629436,
            "beta_fast": 16.0,
        },
    ),
    "base": ({"rope.freq_base": 500_000.0}, {"rope_type": "default", "rope_theta": 500_000.0}),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_are_those_of_the_file(name: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    more, rope = ROPES[name]
    loaded = load_model(str(write_llama(tmp_path / "m.gguf", llama, more)), torch.float32)
    torch.testing.assert_close(_logits(loaded), _logits(_with_rope(llama, **rope)), rtol=0, atol=1e-5)
    if name != "none":
        assert (_logits(loaded) - _logits(llama)).abs().max() > 1


@pytest.mark.parametrize("divisors", [[1.0, 2.0, 3.0, 5.0], None], ids=["any", "Llama 3's"])
def test_frequencies_divided_one_by_one(divisors: list[float] | None, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = llama
    if divisors is None:
        form = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
        expected = _with_rope(llama, rope_type="llama3", **form)
        plain = 1 / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
        divisors = (plain / expected.model.rotary_emb.inv_freq).tolist()
        assert 1 < divisors[1] < 8
    tensors = {"rope_freqs.weight": torch.tensor(divisors)}
    loaded: Any = load_model(str(write_llama(tmp_path / "m.gguf", llama, {}, tensors)), torch.float32)
    if expected is llama:
        expected = copy.deepcopy(llama)
        expected.model.rotary_emb.inv_freq /= torch.tensor(divisors)
    else:
        assert loaded.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(_logits(loaded), _logits(expected), rtol=0, atol=1e-4)
    loaded.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(_logits(again), _logits(loaded), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention.scale", 0.1),
        ("attention.sliding_window", 64),
        ("expert_count", 4),
        ("expert_weights_scale", 2.5),
        ("residual_scale", 0.5),
        ("logit_scale", 0.1),
        ("attention.value_length", 4),
        ("attention.max_alibi_bias", 8.0),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.dimension_sections", [2, 2]),
        ("rope.scaling.type", "twisted"),
        ("rope.unheard_of", 3),
        ("swiglu_clamp_exp", 7.0),
        ("feed_forward_length", [172, 128, 172, 172, 172]),
    ],
)
def test_what_a_llama_has_no_place_for_is_refused(
    key: str, value: Any, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "m.gguf", llama, {key: value})
    with pytest.raises(UnsupportedModel, match=rf"^Model '{path}' has llama\.{key} = .* in its GGUF file, for which"):
        load_model(str(path), torch.float32)


def test_two_scalings_at_once_are_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama, YARN, {"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    with pytest.raises(UnsupportedModel, match=r"has rope_freqs\.weight in its GGUF file"):
        load_model(str(path), torch.float32)


def test_values_without_effect_change_nothing(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    neutral = {
        "attn_logit_softcapping": 0.0,
        "attention.scale": 8**-0.5,
        "attention.sliding_window": 512,
        "attention.causal": True,
        "expert_count": 0,
        "logit_scale": 1.0,
        "rope.scaling.finetuned": True,
        "rope.scaling.factor": 1.0,
        "use_parallel_residual": False,
    }
    tensors = {"rope_freqs.weight": torch.ones(4)}
    loaded = load_model(str(write_llama(tmp_path / "m.gguf", llama, neutral, tensors)), torch.float32)
    assert torch.equal(_logits(loaded), _logits(llama))


@pytest.mark.parametrize("tensor", ["blk.1.attn_q.bias", "blk.0.attn_q_norm.weight", "output.bias"])
def test_tensors_that_the_reader_drops_are_refused(tensor: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama, {}, {tensor: torch.ones(64)})
    with pytest.raises(
        UnsupportedModel, match=rf"has the tensor {tensor} in its GGUF file, for which LlamaForCausalLM"
    ):
        load_model(str(path))


def test_one_of_several_parts_is_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama, {"/split.count": 3})
    with pytest.raises(ConfigError, match="is one of 3 parts: join them"):
        load_model(str(path))


def test_a_list_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    key = b"llama.block_count"
    array = struct.pack("<IIQ", 9, 4, 2**40)  # a list of 32-bit numbers
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key))
    (tmp_path / "m.gguf").write_bytes(header + key + array + bytes(64))
    with pytest.raises(ConfigError, match="is damaged or no GGUF file"):
        read_gguf_metadata(tmp_path / "m.gguf")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ConfigError, match="is damaged or no GGUF file"):
        read_gguf_metadata(tmp_path / "m.gguf")


_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
# Configuration, keys that llama.cpp's converter writes, and the fields they must lead to.
CARRIED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gemma2": (
        Gemma2Config(**_SIZES, num_key_value_heads=4, head_dim=16),
        {
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "attention.sliding_window": 128,
            "attention.scale": 24**-0.5,
        },
        {
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "sliding_window": 128,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": (
        Gemma3TextConfig(**_SIZES, num_key_value_heads=4, head_dim=16),
        {
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 20_000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            }
        },
    ),
    "starcoder2": (
        Starcoder2Config(**_SIZES, num_key_value_heads=4),
        {"rope.freq_base": 123_456.0, "attention.layer_norm_epsilon": 1e-6, "rope.dimension_count": 16},
        {"rope_theta": 123_456.0, "norm_epsilon": 1e-6},
    ),
    "gpt2": (
        GPT2Config(n_embd=64, n_head=4, n_layer=2),
        {"context_length": 256, "feed_forward_length": 256, "attention.key_length": 16, "attention.head_count": 4},
        {"n_positions": 256, "n_inner": None},
    ),
    "qwen2moe": (
        Qwen2MoeConfig(**_SIZES, num_key_value_heads=4, num_experts=4),
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "expert_shared_feed_forward_length": 56,
            "expert_gating_func": 1,
            "expert_weights_norm": True,
        },
        {
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 56,
            "norm_topk_prob": True,
        },
    ),
    "qwen3": (
        Qwen3Config(**_SIZES, num_key_value_heads=4, head_dim=16, max_position_embeddings=4096),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    ),
    "gpt-oss": (
        GptOssConfig(**_SIZES, num_key_value_heads=4, head_dim=16, max_position_embeddings=131072, sliding_window=128),
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 128,
            "expert_feed_forward_length": 96,
        },
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "intermediate_size": 96},
    ),
    "mamba": (
        MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=16, conv_kernel=4, time_step_rank=4),
        {
            "context_length": 4096,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 128,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 4,
            "ssm.dt_b_c_rms": False,
        },
        {"conv_kernel": 4},
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_configurations_have_a_place_for_is_written_there(name: str) -> None:
    config, values, fields = CARRIED[name]
    config = copy.deepcopy(config)
    complete_config(config, GgufMetadata(name, {"block_count": 2, **values}), "m")
    rope = getattr(config, "rope_parameters", None) or {}
    for key, value in fields.items():
        assert (getattr(config, key) if hasattr(config, key) else rope[key]) == value, key
    # Written configurations are read again.
    again = AutoConfig.for_model(**config.to_dict())
    assert (getattr(again, "rope_parameters", None) or {}) == rope


def test_long_rope_from_the_factors_of_a_file() -> None:
    config = LlamaConfig(**_SIZES, num_key_value_heads=4, max_position_embeddings=4096)
    factors = {"rope_factors_long.weight": [2.0] * 8, "rope_factors_short.weight": [1.0] * 8}
    values = {"rope.scaling.original_context_length": 1024, "rope.scaling.attn_factor": 1.2}
    complete_config(config, GgufMetadata("llama", values, factors), "m")
    assert config.rope_parameters == {
        "rope_theta": 10_000.0,
        "rope_type": "longrope",
        "long_factor": [2.0] * 8,
        "short_factor": [1.0] * 8,
        "original_max_position_embeddings": 1024,
        "factor": 4.0,
        "attention_factor": 1.2,
    }
    with pytest.raises(UnsupportedModel, match=r"llama\.rope\.scaling\.type"):
        complete_config(LlamaConfig(**_SIZES), GgufMetadata("llama", {"rope.scaling.type": "longrope"}), "m")
