"""GGUF files of tiny models, written with the package gguf, and their meaning computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from transformers import LlamaForCausalLM

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_llama(
    path: Path,
    model: LlamaForCausalLM,
    more: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a LLaMA with the keys that llama.cpp writes, and more of them.

    Args:
        path: of the file.
        model: with untied embeddings.
        more: further hyper-parameters by key, without the architecture, which override the model's; a key after a slash
            is written as it is.
        tensors: further tensors by name.
    """
    config: Any = model.config
    head = config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head,
        "attention.value_length": head,
        "tensor_data_layout": "Meta AI original pth",
    }
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in {**values, **(more or {})}.items():
        _add(writer, key[1:] if key.startswith("/") else f"llama.{key}", value)
    for name, tensor in {**_llama_tensors(model), **(tensors or {})}.items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _llama_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    config: Any = model.config
    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    tensors = {f"{name}.weight": state[f"{part}.weight"] for name, part in names.items()}
    for i in range(config.num_hidden_layers):
        for part, name in _NAMES.items():
            weight = state[f"model.layers.{i}.{part}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            if heads is not None:  # llama.cpp rotates neighbouring rows
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{i}.{name}.weight"] = weight
    return tensors
