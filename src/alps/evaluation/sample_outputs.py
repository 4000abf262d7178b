"""Greedy continuations of prompts, as samples of a model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from alps.core.errors import ConfigError
from alps.core.half_precision import half_matmul_in_float32
from alps.data.loaded_model import LoadedModel
from alps.inference.text_generation import finite_logits
from alps.models.positions import check_prompt


def continue_prompts(
    loaded: LoadedModel, prompts: Sequence[str], tokens: int, device: torch.device
) -> list[tuple[str, str]]:
    """Continue prompts greedily, one at a time, without a template.

    Args:
        loaded: a model with a tokenizer; moved to `device` and left there.
        prompts: texts.
        tokens: largest number of new tokens.
        device: for the model.

    Returns:
        Pairs of a prompt and its continuation.

    Raises:
        ConfigError: see `prompt_ids`.
        NotFinite: when logits are NaN or infinite.
    """
    if not prompts:
        return []
    model: Any = loaded.model.to(device)
    training = model.training
    model.eval()
    try:
        batches = prompt_ids(loaded, prompts, tokens)
        texts = [_continue(model, loaded.tokenizer, ids.to(device), tokens, device) for ids in batches]
        return list(zip(prompts, texts, strict=True))
    finally:
        model.train(training)


def prompt_ids(loaded: LoadedModel, prompts: Sequence[str], tokens: int) -> list[Tensor]:
    """Return the token ids of prompts, (1, tokens) each.

    Args:
        loaded: a model with a tokenizer.
        prompts: texts.
        tokens: largest number of new tokens.

    Raises:
        ConfigError: without a tokenizer, or for a prompt without tokens or too long for the model.
    """
    if prompts and loaded.tokenizer is None:
        raise ConfigError(f"Prompts need a tokenizer, and '{loaded.name}' has none: leave them out.")
    batches = [loaded.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    for prompt, ids in zip(prompts, batches, strict=True):
        if not ids.numel():
            raise ConfigError(f"Prompt {prompt!r} has no tokens: write a few words.")
        check_prompt(loaded.model, ids, tokens)
    return batches


def _continue(model: Any, tokenizer: Any, ids: Tensor, tokens: int, device: torch.device) -> str:
    ends = model.generation_config.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    # The model's generation settings may sample. Without a padding token generate() warns.
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=first_end or 0)
    own = model.generation_config
    # Settings that are not given here would be the model's own: penalties, beams, other outputs.
    model.generation_config = greedy
    try:
        with torch.inference_mode(), half_matmul_in_float32(device, model):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=greedy,
                logits_processor=[finite_logits(model, ids.shape[1])],
            )
    finally:
        model.generation_config = own
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
