"""Largest number of tokens that a model takes at once, and the checks of prompts before any work."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from alps.core.errors import ConfigError
from alps.models.auto_class import text_config

_LOG = logging.getLogger("alps")
# Names of the limit in configurations; the first that is there counts. Models without a limit have -1 or 0 there.
_LIMITS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length"),
    *("seq_length", "n_ctx", "max_target_positions"),
)
# Tokenizers without a limit have a number of this size.
_NO_LIMIT = 10**9


def position_limit(config: Any) -> int | None:
    """Return the largest number of tokens of a window; None for a configuration without a limit.

    Args:
        config: of the text model.
    """
    limits = (getattr(config, name, None) for name in _LIMITS)
    return next((limit for limit in limits if type(limit) is int and limit > 0), None)


def check_window(model: nn.Module, tokenizer: Any, seqlen: int) -> None:
    """Refuse windows that are longer than a model takes; warn where only its tokenizer says so.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, or None.
        seqlen: tokens in a window.

    Raises:
        ConfigError: with the limit of the model.
    """
    limit = position_limit(text_config(model))
    if limit is not None and seqlen > limit:
        raise ConfigError(f"Windows of {seqlen} tokens are longer than the {limit} this model takes: lower --seqlen.")
    hint = getattr(tokenizer, "model_max_length", None)
    if limit is None and isinstance(hint, int) and hint < min(seqlen, _NO_LIMIT):
        _LOG.warning(f"Windows of {seqlen} tokens are longer than the {hint} that the model's tokenizer names.")


def check_tokens(model: nn.Module, ids: Tensor, subject: str) -> None:
    """Refuse token ids for which a model has no embedding.

    Args:
        model: a causal language model.
        ids: token ids of any shape.
        subject: the text in words, with which the message begins.

    Raises:
        ConfigError: naming the largest.
    """
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if (largest := int(ids.max())) >= size:
        raise ConfigError(
            f"{subject} has token {largest}, outside the model's vocabulary of {size}: the tokenizer does not belong "
            "to this model."
        )


def check_prompt(model: nn.Module, ids: Tensor, new_tokens: int) -> None:
    """Refuse a prompt whose continuation would leave the positions of a model, or with tokens that it does not have.

    Rotary positions are computed for any length. Beyond the limit of such a model the text is of little use, and a
    warning says so; models with a table of positions fail there.

    Args:
        model: a causal language model.
        ids: token ids of the prompt, (1, tokens).
        new_tokens: largest number of tokens to generate.

    Raises:
        ConfigError: with the numbers.
    """
    check_tokens(model, ids, "The prompt")
    limit, prompt = position_limit(text_config(model)), ids.shape[1]
    if limit is None or prompt + new_tokens <= limit:
        return
    words = f"{prompt} tokens of the prompt and {new_tokens} new ones are more than the {limit} this model takes"
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        raise ConfigError(f"{words}: ask for fewer tokens, or shorten the prompt.")
    _LOG.warning(f"{words}: what follows them is of little use.")
