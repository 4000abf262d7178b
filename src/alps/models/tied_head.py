"""Checkpoints that hold an output head of their own, though their configuration says that it is the embedding.

The reading is that of transformers 5: a head with other values than the embedding is used, and not tied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alps.models.config_json import is_tied

_LOG = logging.getLogger("alps")


def head_names(model: nn.Module) -> tuple[str, str] | None:
    """Return the names of the weights of embedding and head; None unless their model ties them."""
    embedding, head = _embeddings(model)
    if embedding is None or head is None or not _is_tied_by_config(model):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names or id(head) not in names:
        return None
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def is_other_head(model: nn.Module) -> bool:
    """Check if a model with its weights in memory has another head than its embedding, against its configuration."""
    if head_names(model) is None:
        return False
    embedding, head = (module.weight for module in _embeddings(model))
    if embedding is head or embedding.is_meta or head.is_meta:
        return False
    return not _is_equal(embedding, head)


def untie_config(config: Any, name: str) -> None:
    """Set a configuration to a head of its own, and tell the user.

    Args:
        config: of the model; changed in place.
        name: of the model, for the message.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", None):
            part.tie_word_embeddings = False
    _LOG.warning(
        f"Model '{name}' says tie_word_embeddings in its configuration, but holds a head with other values than its "
        "embedding: this head is used, as transformers does."
    )


def stores_other_head(model: nn.Module, read: Callable[[str], Tensor | None]) -> bool:
    """Check if a checkpoint holds a head with other values than its embedding, against its configuration.

    Args:
        model: on the meta device, with tied weights.
        read: returns a tensor of the checkpoint by its name in the model; None for one that is not stored.
    """
    if (names := head_names(model)) is None:
        return False
    embedding, head = map(read, names)
    return embedding is not None and head is not None and not _is_equal(embedding, head)


def _embeddings(model: nn.Module) -> tuple[Any, Any]:
    try:
        pair = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None, None
    return pair if all(isinstance(getattr(module, "weight", None), Tensor) for module in pair) else (None, None)


def _is_tied_by_config(model: nn.Module) -> bool:
    return bool(getattr(model, "_tied_weights_keys", None)) and is_tied(model.config)


def _is_equal(embedding: Tensor, head: Tensor) -> bool:
    return embedding.shape == head.shape and bool(torch.equal(embedding, head))
