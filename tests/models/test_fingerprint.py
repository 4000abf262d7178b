"""The hash of a model: equal for equal models, different for everything that changes what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from alps.models.fingerprint import forward_sha256, model_sha256


def test_equal_models_have_equal_hashes_wherever_they_lay(tiny_model: Callable[..., Any]) -> None:
    item, other = tiny_model("llama"), tiny_model("llama")
    other.config._name_or_path = "/elsewhere"
    assert model_sha256(item) == model_sha256(other) == model_sha256(item)


def test_whatever_changes_the_model_changes_the_hash(tiny_model: Callable[..., Any]) -> None:
    def bit(model: Any) -> Any:
        model.model.layers[2].mlp.down_proj.weight.data.view(torch.int32)[3, 5] ^= 1
        return model

    def setting(model: Any) -> Any:
        model.config.rms_norm_eps = 1e-3
        return model

    def shape(model: Any) -> Any:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.reshape(weight.shape[1], weight.shape[0])
        return model

    def swapped(model: Any) -> Any:
        layer = model.model.layers[0].self_attn
        layer.k_proj, layer.v_proj = layer.v_proj, layer.k_proj
        return model

    def buffer(model: Any) -> Any:
        model.model.rotary_emb.inv_freq.mul_(2)
        return model

    def zero_sign(model: Any) -> Any:
        # +0.0 and -0.0 compare equal and are other bytes.
        model.lm_head.weight.data[0, 0] = -0.0
        return model

    def zero(model: Any) -> Any:
        model.lm_head.weight.data[0, 0] = 0.0
        return model

    def half(model: Any) -> Any:
        return model.to(torch.bfloat16)

    changes: list[Callable[[Any], Any]] = [lambda m: m, bit, setting, shape, swapped, buffer, zero_sign, zero, half]
    hashes = [model_sha256(change(tiny_model("llama"))) for change in changes]
    hashes += [model_sha256(tiny_model(kind)) for kind in ("opt", "opt-postnorm", "gpt2")]
    assert len(set(hashes)) == len(hashes)


def test_a_forward_depends_on_neither_outputs_nor_tokens_of_generation(tiny_model: Callable[..., Any]) -> None:
    mended: dict[str, Any] = {
        "pad_token_id": 1,
        "eos_token_id": [1, 2],
        "bos_token_id": 5,
        "use_cache": False,
        "output_hidden_states": True,
        "attention_dropout": 0.1,
        "architectures": ["Another"],
        "id2label": {0: "a"},
        "temperature": 0.5,
        "initializer_range": 0.5,
        "remark_of_a_program": "fast",
    }
    expected = forward_sha256(tiny_model("llama"))
    for name, value in mended.items():
        model = tiny_model("llama")
        setattr(model.config, name, value)
        assert forward_sha256(model) == expected, name
        assert name == "architectures" or model_sha256(model) != model_sha256(tiny_model("llama")), name


def test_a_forward_depends_on_everything_else(tiny_model: Callable[..., Any]) -> None:
    used: dict[str, Any] = {
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "hidden_act": "relu",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        # Not a field of its class, but one that code of the library reads.
        "attention_chunk_size": 5,
    }
    hashes = {forward_sha256(tiny_model("llama")), forward_sha256(tiny_model("llama").to(torch.bfloat16))}
    for name, value in used.items():
        model = tiny_model("llama")
        setattr(model.config, name, value)
        hashes.add(forward_sha256(model))
    assert len(hashes) == 2 + len(used)


def test_the_padding_id_counts_where_positions_are_counted_from_it(tiny_model: Callable[..., Any]) -> None:
    class Positions(nn.Module):
        padding_idx = 0

    first, second = tiny_model("llama"), tiny_model("llama")
    first.model.positions, second.model.positions = Positions(), Positions()
    second.config.pad_token_id = 1
    assert forward_sha256(first) != forward_sha256(second)
