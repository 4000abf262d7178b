"""Checkpoints of a release of transformers before 5: written by it, and read by whichever release runs this file.

    PYTHON tests/helpers/older_transformers.py write FOLDER
    PYTHON tests/helpers/older_transformers.py read FOLDER RESULT.pt

Imports nothing of the project, so that it runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

TEXT = "Hello <pad> World, 12 words.\n  It's </s>"
_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_NEOX = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
_LAYER_TYPES = ["sliding_attention", "full_attention"]

# Every rope differs from what a reader takes when it misses the fields of the file.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, rope_theta=5e5),
    "llama, llama3 scaling": lambda: LlamaConfig(
        **_SHAPE, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **_LLAMA3}
    ),
    "llama, linear scaling": lambda: LlamaConfig(**_SHAPE, rope_scaling={"type": "linear", "factor": 4.0}),
    "mistral": lambda: MistralConfig(**_SHAPE, rope_theta=1e6, sliding_window=32),
    "qwen2": lambda: Qwen2Config(**_SHAPE, rope_theta=1e6),
    "qwen2, yarn": lambda: Qwen2Config(**_SHAPE, rope_theta=1e6, rope_scaling=dict(_YARN)),
    "phi3, longrope": lambda: Phi3Config(**_SHAPE, original_max_position_embeddings=64, rope_scaling=dict(_LONGROPE)),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX, rotary_emb_base=20000, rotary_pct=0.5),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=8, rope_theta=2e4, sliding_window=32),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        head_dim=8,
        rope_theta=1e6,
        rope_local_base_freq=5e3,
        sliding_window=32,
        layer_types=_LAYER_TYPES,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "mixtral": lambda: MixtralConfig(**_SHAPE, rope_theta=5e5, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, rope_theta=5e5, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


def write_checkpoints(folder: Path) -> None:
    """Write a checkpoint with random weights and a tokenizer for every configuration."""
    for name, make_config in CONFIGS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(make_config())
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.15 if parameter.ndim > 1 else 0.1)
        model.save_pretrained(folder / name)
        _save_tokenizer(folder / name, byte_pairs=name.startswith("qwen2"))


def read_checkpoints(folder: Path) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Return the logits of every checkpoint on the same token ids, and the ids of the same text."""
    torch.manual_seed(3)
    ids = torch.randint(3, 300, (2, 100))
    outcomes = {}
    for path in sorted(folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            outcomes[path.name] = (model(input_ids=ids).logits, AutoTokenizer.from_pretrained(path)(TEXT).input_ids)
    return outcomes


def _save_tokenizer(folder: Path, byte_pairs: bool) -> None:
    """Save a tokenizer of single characters, or, for a class that rebuilds its parts, one of Qwen 2's kind."""
    special = ["<s>", "</s>", "<pad>"]
    if byte_pairs:
        words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "He", "Ġw", "or"]
        vocabulary, merges = {word: number for number, word in enumerate(words)}, ["H e", "Ġ w", "o r"]
        folder.joinpath("vocab.json").write_text(json.dumps(vocabulary))
        folder.joinpath("merges.txt").write_text("\n".join(merges) + "\n")
        from transformers import Qwen2TokenizerFast

        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        names = {"unk_token": "<s>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        Qwen2TokenizerFast(*files, **names).save_pretrained(folder)
        return
    letters = "abcdefghijklmnopqrstuvwxyzHIW0123456789 \n.,'"
    vocabulary = {word: number for number, word in enumerate([*special, "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    characters = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<pad>"], **names)
    characters.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_checkpoints(Path(sys.argv[2]))
    else:
        torch.save(read_checkpoints(Path(sys.argv[2])), sys.argv[3])
