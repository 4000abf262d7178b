"""Tiny random models of many architectures, on which tests prove that they are supported.

Every model has 64 tokens, a hidden size of 32 and few blocks, and none of the weights is trained. Each kind of block of
an architecture (kinds of attention, dense and sparse feed-forward) appears at least twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.lm_head import LMHead
from alps.calibration.replay_check import check_replay
from alps.models.blocks import Block

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GPT: dict[str, Any] = {"vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
_ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}


def _sized(kind: str, without: str = "", **more: Any) -> Callable[[], Any]:
    sizes = {key: value for key, value in _SIZES.items() if key not in without.split()}
    return lambda: AutoConfig.for_model(kind, **{**sizes, **more})


def _bare(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: AutoConfig.for_model(kind, **{**_ENDS, **more})


_OPT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}

DENSE: dict[str, Callable[[], Any]] = {
    "llama": _sized("llama"),
    "mistral": _sized("mistral", head_dim=8, sliding_window=6),
    "qwen2": _sized("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": _sized("qwen3", head_dim=8),
    "gemma": _sized("gemma", head_dim=8),
    "gemma2": _sized("gemma2", head_dim=8, sliding_window=6, layer_types=_SLIDING),
    "gemma3": _sized("gemma3_text", head_dim=8, sliding_window=6, layer_types=_SLIDING),
    "phi": _sized("phi"),
    "phi3": _sized("phi3"),
    "opt": _bare("opt", **_OPT),
    "opt-projected": _bare("opt", **_OPT, word_embed_proj_dim=16),
    "opt-postnorm": _bare("opt", **_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": _bare("gpt2", **_GPT),
    "gpt_bigcode": _bare("gpt_bigcode", **_GPT),
    "gpt_bigcode-multihead": _bare("gpt_bigcode", **_GPT, multi_query=False),
    "gptj": _bare("gptj", **_GPT, rotary_dim=4),
    "gpt_neo": _bare(
        "gpt_neo",
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=128,
        window_size=6,
    ),
    "gpt_neox": _sized("gpt_neox", "num_key_value_heads"),
    "gpt_neox-sequential": _sized("gpt_neox", "num_key_value_heads", use_parallel_residual=False),
    "bloom": _bare("bloom", vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
    "falcon": _bare("falcon", vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "falcon-new": _bare(
        "falcon",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon-alibi": _bare(
        "falcon",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
    ),
    "mpt": _bare("mpt", vocab_size=64, d_model=32, n_layers=3, n_heads=4, max_seq_len=128),
    "codegen": _bare("codegen", **_GPT, rotary_dim=4),
    "stablelm": _sized("stablelm"),
    "stablelm-parallel": _sized("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": _sized("starcoder2", sliding_window=6),
    "olmo": _sized("olmo"),
    "olmo2": _sized("olmo2"),
    "olmo3": _sized("olmo3", sliding_window=6, layer_types=_SLIDING),
    "granite": _sized("granite", residual_multiplier=0.5, embedding_multiplier=2.0),
    "smollm3": _sized("smollm3", no_rope_layers=[1, 0, 1, 0]),
    "cohere": _sized("cohere"),
    "cohere2": _sized("cohere2", head_dim=8, sliding_window=6, layer_types=_SLIDING),
    "glm": _sized("glm", head_dim=8),
    "glm4": _sized("glm4", head_dim=8),
    "nemotron": _sized("nemotron"),
    "exaone4": _sized("exaone4", sliding_window=6, layer_types=_SLIDING),
    "ernie4_5": _sized("ernie4_5", head_dim=8),
    "helium": _sized("helium", head_dim=8),
    "persimmon": _sized("persimmon", "num_key_value_heads"),
    "biogpt": _sized("biogpt", "num_key_value_heads pad_token_id", pad_token_id=1),
    "xglm": _bare("xglm", vocab_size=64, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, pad_token_id=1),
    "seed_oss": _sized("seed_oss", head_dim=8),
    "arcee": _sized("arcee"),
    "apertus": _sized("apertus"),
}
MOE: dict[str, Callable[[], Any]] = {
    "mixtral": _sized("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _sized(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": _sized("qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "olmoe": _sized("olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _sized(
        "gpt_oss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=_SLIDING,
    ),
    "deepseek_v2": _sized("deepseek_v2", "num_key_value_heads", **_DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": _sized("deepseek_v3", "num_key_value_heads", **_DEEPSEEK),
    "phimoe": _sized("phimoe", num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": _sized("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": _sized(
        "glm4_moe",
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "jetmoe": _sized("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "llama4": _sized(
        "llama4_text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=6,
        moe_layers=[1, 3],
    ),
    "ernie4_5_moe": _sized(
        "ernie4_5_moe", head_dim=8, moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1
    ),
}
_LINEAR = ["linear_attention", "full_attention"] * 2
_MAMBA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}
# Blocks without attention, or with attention in some blocks only.
HYBRID: dict[str, Callable[[], Any]] = {
    "mamba": _bare("mamba", **_MAMBA, time_step_rank=4),
    "mamba2": _bare("mamba2", **_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "jamba": _sized(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "olmo_hybrid": _sized(
        "olmo_hybrid",
        layer_types=_LINEAR,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
    ),
    "zamba": _sized(
        "zamba",
        "num_key_value_heads pad_token_id",
        num_key_value_heads=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        pad_token_id=2,
    ),
}
# Blocks that a forward without images skips.
IMAGES: dict[str, Callable[[], Any]] = {
    "mllama": lambda: MllamaTextConfig(**{**_SIZES, "pad_token_id": 2}, cross_attention_layers=[1, 3]),
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": _SLIDING,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
}
# Blocks that read values of the tokens or of earlier blocks, return more than their hidden states, or have no
# attention.
RECENT: dict[str, Callable[[], Any]] = {
    "gemma3n": _sized("gemma3n_text", **_GEMMA, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4),
    "gemma4": _sized("gemma4_text", **_GEMMA, global_head_dim=8),
    "deepseek_v4": _sized(
        "deepseek_v4",
        "num_key_value_heads",
        **{**_MLA, "num_key_value_heads": 2},
        head_dim=8,
        o_lora_rank=8,
        o_groups=2,
    ),
    "glm_moe_dsa": _sized("glm_moe_dsa", "num_key_value_heads", **_MLA, head_dim=8, first_k_dense_replace=1),
    "zaya": _sized(
        "zaya", head_dim=8, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24, router_hidden_size=16
    ),
    "bamba": _sized(
        "bamba", attn_layer_indices=[1, 3], mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_chunk_size=16
    ),
    "rwkv": _sized("rwkv", "num_key_value_heads num_attention_heads", attention_hidden_size=32, context_length=128),
    "xlstm": _sized("xlstm", embedding_dim=32, num_blocks=4, num_heads=4, chunk_size=16),
    "cpmant": _bare(
        "cpmant", vocab_size=64, hidden_size=32, dim_ff=48, num_hidden_layers=3, num_attention_heads=4, dim_head=8
    ),
    "lfm2": _sized("lfm2", layer_types=["conv", "full_attention"] * 2, block_ff_dim=48, block_auto_adjust_ff_dim=False),
    "hunyuan_v1_moe": _sized("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=2),
}

# Variants of others that structured pruning has a row for.
STRUCTURED: dict[str, Callable[[], Any]] = {
    "ministral": _sized("ministral", head_dim=8, sliding_window=6, layer_types=_SLIDING),
    "ministral3": _sized("ministral3", head_dim=8),
    "cwm": _sized("cwm", head_dim=8, sliding_window=6, layer_types=_SLIDING),
    "hunyuan_v1_dense": _sized("hunyuan_v1_dense", head_dim=8),
    "vaultgemma": _sized("vaultgemma", head_dim=8, sliding_window=6, layer_types=_SLIDING),
}

# Their initial values keep a recurrence stable.
_OWN_VALUES = ("A_log", "dt_bias", ".D")


def decoder(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of that kind in evaluation mode; equal calls give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261125)
        try:
            config = {**DENSE, **MOE, **HYBRID, **IMAGES, **RECENT, **STRUCTURED}[kind]()
        except ValueError as error:
            pytest.skip(f"this transformers has no such architecture: {error}")
        # The text part of Mllama has a configuration of its own, which no auto class knows.
        is_mllama = isinstance(config, MllamaTextConfig)
        model: nn.Module = MllamaForCausalLM(config) if is_mllama else AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            # Initial weights are too small for a block to matter, and initial norms and biases have no effect.
            for name, parameter in model.named_parameters():
                if name.endswith(_OWN_VALUES):
                    continue
                scale = 0.2 if parameter.ndim > 1 else 0.1
                shift = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(shift + scale * torch.randn_like(parameter))
    return model.eval().to(dtype)


def check_walk(model: nn.Module, blocks: list[Block], ids: Tensor) -> None:
    """Assert that running the unpruned blocks one by one gives the logits of the model."""
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        # Several batches of one size, since the arguments of one batch must not serve another.
        inputs = capture_block_inputs(model, blocks, ids, batch_size=2)
        check_replay(model, blocks, inputs, ids, torch.device("cpu"))
        for block in blocks:
            before = torch.cat(inputs.hidden)
            inputs.advance(block.index, block.module, torch.device("cpu"))
            # Leaving out a block of small effect would go unnoticed.
            assert float((torch.cat(inputs.hidden) - before).norm() / before.norm()) > 0.05, block.name
        logits = LMHead(model, blocks, inputs.calls.layout)(torch.cat(inputs.hidden), ids)
    assert float((logits - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1.0)
