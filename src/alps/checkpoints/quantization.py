"""Formats that `quantization_config` of a configuration names: ordinary weights, or some that cannot be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alps.core.errors import CheckpointError, truncate

# Older files of compressed-tensors have the second name.
_KEYS = ("quantization_config", "compression_config")
_COMPRESSED_TENSORS = "compressed-tensors"
# What a packed directory has as its quant_method.
PACKED_METHOD = "alps"


def check_quantization(config: Any, name: str) -> None:
    """Refuse a configuration whose weights are quantized or stored in a sparse format.

    Args:
        config: content of config.json.
        name: of the checkpoint, as the user gave it.

    Raises:
        CheckpointError: naming the format.
    """
    if not isinstance(config, dict):
        return
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for settings in [part[key] for part in parts for key in _KEYS if part.get(key)]:
        if is_packed_method(settings):
            raise CheckpointError(f"The weights in '{name}' are packed: use what `alps unpack` makes of its directory.")
        if not is_dense(settings):
            kind = "quantized" if _is_quantized(settings) else "compressed"
            raise CheckpointError(
                f"The weights in '{name}' are {kind} ({_describe(settings)}): use the un{kind} checkpoint."
            )


def is_dense(settings: Any) -> bool:
    """Check if the weights are ordinary tensors, as llm-compressor writes those of models that it has only pruned."""
    return not _is_quantized(settings) and all(name in (None, "dense") for name in _formats(settings))


def is_packed_method(settings: Any) -> bool:
    """Check if a `quantization_config` is that of a packed directory."""
    return isinstance(settings, Mapping) and settings.get("quant_method") == PACKED_METHOD


def _is_quantized(settings: Any) -> bool:
    """Check for anything but a record of compressed-tensors without groups of quantized layers."""
    return (
        not isinstance(settings, Mapping)
        or settings.get("quant_method", _COMPRESSED_TENSORS) != _COMPRESSED_TENSORS
        or bool(settings.get("config_groups") or settings.get("kv_cache_scheme"))
        or all(name is None for name in _formats(settings))
    )


def _formats(settings: Mapping[str, Any]) -> list[Any]:
    sparsity = settings.get("sparsity_config") or {}
    return [settings.get("format"), sparsity.get("format") if isinstance(sparsity, Mapping) else "unknown"]


def _describe(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return truncate(settings)
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    words = [settings.get("quant_method"), *_formats(settings), f"{bits} bits" if bits else None]
    return ", ".join(dict.fromkeys(truncate(word) for word in words if word and word != "dense")) or "unknown format"
