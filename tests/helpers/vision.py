"""Tiny random vision-language models: a text decoder of three blocks, and a vision tower with more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_PATCHES = {"depth": 6, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}


def _llava() -> Any:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=63,
    )


def _gemma3() -> Any:
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=6, layer_types=_SLIDING),
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    )


def _qwen2_vl() -> Any:
    token_ids = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": _ROPE}, vision_config=_PATCHES, **token_ids)


def _idefics3(kind: Any) -> Any:
    return kind(vision_config=_VISION, text_config=LlamaConfig(**_TEXT), image_token_id=63, scale_factor=2)


# Configuration by kind, and the name of the text decoder's list of blocks.
VISION: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "model.language_model.layers"),
    "gemma3-vision": (_gemma3, "model.language_model.layers"),
    "qwen2_vl": (_qwen2_vl, "model.language_model.layers"),
    "idefics3": (lambda: _idefics3(Idefics3Config), "model.text_model.layers"),
    "smolvlm": (lambda: _idefics3(SmolVLMConfig), "model.text_model.layers"),
}


def vision_model(kind: str) -> Any:
    """Return a random model of that kind in evaluation mode; equal calls give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261126)
        model: nn.Module = AutoModelForImageTextToText.from_config(VISION[kind][0]())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.1
                shift = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(shift + scale * torch.randn_like(parameter))
    return model.eval()
