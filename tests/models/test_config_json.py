"""Edits of config.json: one field of a copy, and fields for older readers that leave newer ones what they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from alps.core.errors import CheckpointError
from alps.models.config_json import add_older_fields, declare_dtype, declare_own_head, declare_size, declared_dtype

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"torch_dtype": "float32",\r\n\t"a":1.50}', '{"torch_dtype": "bfloat16",\r\n\t"a":1.50}'),
        ('{ "dtype" : "torch.float16"}', '{ "dtype" : "torch.bfloat16"}'),
        ('\ufeff{"dtype": "float32", "ä": 1}\n\n', '\ufeff{"dtype": "bfloat16", "ä": 1}\n\n'),
        (
            '{"vision_config": {"dtype": "float32"}, "text_config": {"dtype": "float32", "ssm_dtype": "float32"}}',
            '{"vision_config": {"dtype": "bfloat16"}, "text_config": {"dtype": "bfloat16", "ssm_dtype": "float32"}}',
        ),
        ('{"hidden_size": 3}', '{"hidden_size": 3}'),
        ('{"torch_dtype":"bfloat16", "x_config": {"dtype": "float32"}}', None),
        ('{"torch_dtype": null}', None),
    ],
)
def test_nothing_but_the_dtype_of_a_copy_changes(tmp_path: Path, before: str, after: str | None) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(before.encode())
    declare_dtype(path, torch.bfloat16)
    assert path.read_bytes().decode() == (before if after is None else after)


def test_a_config_in_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"dtype": "float32"}'.encode("utf-16"))
    with pytest.raises(CheckpointError, match="not UTF-8"):
        declare_dtype(tmp_path / "config.json", torch.bfloat16)


def test_the_dtype_is_that_of_the_text_model() -> None:
    assert declared_dtype({"dtype": "torch.float16"}) == declared_dtype({"torch_dtype": "float16"}) == "float16"
    assert declared_dtype({"text_config": {"torch_dtype": "float32"}}) == "float32"
    assert declared_dtype({"torch_dtype": None, "text_config": 3}) is None


def test_an_index_keeps_all_but_its_size() -> None:
    text = '{"metadata": {"total_parameters": 7, "total_size": 28.0},\n "weight_map": {"a": "b"}}\n'
    assert declare_size(text, 14) == text.replace("28.0", "14")


_ROPES: list[tuple[PretrainedConfig, dict[str, Any]]] = [
    (LlamaConfig(**_SMALL, rope_theta=5e5), {"rope_theta": 5e5, "rope_scaling": None}),
    (
        LlamaConfig(**_SMALL, rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 4.0}),
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    (
        Qwen2Config(
            **_SMALL,
            rope_theta=1e6,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    (
        Phi3Config(
            **_SMALL,
            pad_token_id=None,
            original_max_position_embeddings=64,
            rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
    ),
    (
        GPTNeoXConfig(
            **_SMALL, rotary_emb_base=2e4, rotary_pct=0.5, rope_scaling={"rope_type": "linear", "factor": 2.0}
        ),
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        Qwen3MoeConfig(**_SMALL, num_key_value_heads=2, num_experts=6, rope_theta=1e6),
        {"rope_theta": 1e6, "num_experts": 6, "num_local_experts": 6},
    ),
    (
        Gemma3TextConfig(**_SMALL, rope_theta=1e6, rope_local_base_freq=5e3),
        {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": None},
    ),
]


@pytest.mark.parametrize(("config", "older"), _ROPES, ids=lambda value: getattr(value, "model_type", ""))
@pytest.mark.filterwarnings("ignore")
def test_older_fields_of_a_rope_say_the_same(config: PretrainedConfig, older: dict[str, Any], tmp_path: Path) -> None:
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    before = type(config).from_pretrained(tmp_path)
    add_older_fields(tmp_path, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == fields["dtype"] == "bfloat16" and "rope_parameters" in fields
    assert {name: fields.get(name) for name in older} == older
    after = type(config).from_pretrained(tmp_path)
    rope = {name: value for name, value in after.rope_parameters.items() if name != "type"}
    assert rope == before.rope_parameters and after.dtype == before.dtype


def test_a_tokenizer_of_version_5_gets_a_class_and_tokens_that_version_4_knows(
    word_tokenizer: Any, tmp_path: Path
) -> None:
    LlamaConfig(**_SMALL).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    path.write_text(json.dumps({**settings, "extra_special_tokens": ["<s>"]}))
    add_older_fields(tmp_path, LlamaConfig(**_SMALL))
    changed = json.loads(path.read_text())
    assert changed["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert changed["additional_special_tokens"] == ["<s>"] and "extra_special_tokens" not in changed


@pytest.mark.parametrize(
    ("text", "tied", "expected"),
    [
        ('{"tie_word_embeddings":  true, "a": 1}', False, '{"tie_word_embeddings":  false, "a": 1}'),
        ('{"tie_word_embeddings": true}', True, '{"tie_word_embeddings": true}'),
        ('{"tie_word_embeddings": false}', False, '{"tie_word_embeddings": false}'),
        ('{"vocab_size": 7}', False, '{\n  "tie_word_embeddings": false,"vocab_size": 7}'),
    ],
)
def test_a_head_of_its_own_is_declared(text: str, tied: bool, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    declare_own_head(path, GemmaConfig(tie_word_embeddings=tied))
    assert path.read_text() == expected


def test_infinities_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    config = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, time_step_limit=(0.0, float("inf")))
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    assert b"__float__" in before
    declare_own_head(tmp_path / "config.json", config)
    assert (tmp_path / "config.json").read_bytes() == before
    add_older_fields(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Mamba2Config.from_pretrained(tmp_path).time_step_limit[1] == float("inf")
