"""Check that the tensors of a checkpoint are those of the model that its configuration describes."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.architecture_check import names_language_model

_LOG = logging.getLogger("alps")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_REMEDY = "fetch config.json and the weights from the same place"


def check_missing(name: str, model: nn.Module, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks tensors, which transformers would fill with random numbers.

    Args:
        name: of the checkpoint, as the user gave it.
        model: of transformers.
        missing: names in the model of the tensors that the checkpoint lacks.

    Raises:
        ConfigError: naming the first of them.
    """
    if not missing:
        return
    first, kind = min(missing), type(model).__name__
    present = set(model.state_dict()) - set(missing)
    if all(_is_numbered_like(tensor, present) for tensor in missing):
        raise ConfigError(
            f"Checkpoint '{name}' lacks {len(missing)} tensors of {kind}, first {first}, though it has those of lower "
            f"numbers: its config.json says more layers or experts than its weights have; {_REMEDY}."
        )
    raise ConfigError(
        f"Checkpoint '{name}' lacks {len(missing)} tensors of {kind}, first {first}: "
        "it is incomplete or stored in a format that this transformers does not read."
    )


def check_unused(name: str, model: nn.Module, stored: Collection[str], used: Collection[str] = ()) -> None:
    """Refuse a checkpoint with layers that the model has not, or with the head of another task.

    Other tensors that the model has not are left out with a warning.

    Args:
        name: of the checkpoint, as the user gave it.
        model: of transformers.
        stored: names of tensors in the checkpoint that may be unused.
        used: names of tensors in the checkpoint that the model reads, besides those of the model's own tensors.

    Raises:
        ConfigError: for more layers or experts than the configuration says.
        UnsupportedModel: for a class that is no known language model.
    """
    # A tied weight may be stored under a name that nothing reads.
    used = {*used, *_own_names(model)}
    unused = sorted(tensor for tensor in stored if tensor not in used and not _is_ignored(tensor, model))
    if not unused:
        return
    more = [tensor for tensor in unused if _is_numbered_like(tensor, used)]
    if len({_first_number(tensor) for tensor in more}) > _extra_blocks(model.config):
        raise ConfigError(
            f"Checkpoint '{name}' holds {more[0]}, which its config.json leaves no place for, though it has those of "
            f"lower numbers: its config.json says fewer layers or experts than its weights have; {_REMEDY}."
        )
    others = [tensor for tensor in unused if tensor not in more]
    classes: Sequence[str] = getattr(model.config, "architectures", None) or ()
    if others and classes and not names_language_model(classes):
        raise UnsupportedModel(
            f"Model '{name}' ({classes[0]}) holds {others[0]}, which {type(model).__name__} has not: it is a model for "
            "another task, such as a reward model; prune the causal language model that it was made from."
        )
    if others:
        _LOG.warning(
            f"Checkpoint '{name}' holds {len(others)} tensors that {type(model).__name__} has not, first {others[0]}: "
            "they are not used."
        )


def _own_names(model: nn.Module) -> set[str]:
    """Return the names that a checkpoint may have for the model's tensors, with and without the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = model.state_dict().keys()
    return {*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)}


def _is_ignored(tensor: str, model: nn.Module) -> bool:
    """Check for a tensor that transformers knows to be without a use, or a buffer that a model computes itself."""
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, tensor) for pattern in patterns):
        return True
    buffers = {buffer.rpartition(".")[2] for buffer, _ in model.named_buffers()}
    return tensor.rpartition(".")[2] in buffers | {"inv_freq"}


def _is_numbered_like(tensor: str, others: Collection[str]) -> bool:
    """Check if a name is among others once a number is replaced by 0, and no other name has that number there."""
    return any(
        f"{tensor[: match.start()]}0{tensor[match.end() :]}" in others
        and not any(other.startswith(tensor[: match.end() + 1]) for other in others)
        for match in _NUMBER.finditer(tensor)
        if match[0] != "0"
    )


def _first_number(tensor: str) -> str:
    match = _NUMBER.search(tensor)
    return match[0] if match else ""


def _extra_blocks(config: Any) -> int:
    """Return how many blocks a configuration declares that predict further tokens, and are not built."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = (value for key, value in vars(text).items() if "nextn" in key or "mtp" in key)
    return max((value for value in numbers if type(value) is int), default=0)
