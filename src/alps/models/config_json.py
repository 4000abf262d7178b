"""Edits of config.json and tokenizer_config.json: dtype and head of a copy, and fields for older readers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from alps.core.errors import CheckpointError
from alps.core.json_text import to_json
from alps.core.text_format import dtype_name

# A dtype in any of the forms that configurations have: "torch_dtype": "float16", "dtype": "torch.bfloat16".
_DTYPE_FIELD = re.compile(r'("(?:torch_)?dtype"\s*:\s*"(?:torch\.)?)(float64|float32|bfloat16|float16)(")')
_TIED_FIELD = re.compile(r'("tie_word_embeddings"\s*:\s*)true')
_TOTAL_SIZE = re.compile(r'("total_size"\s*:\s*)\d+(?:\.\d+)?')

# Field of older configurations, its key in `rope_parameters`, and a number that no configuration has by default.
_ROPE_FIELDS = (
    ("rope_theta", "rope_theta", 12345.5),
    ("rotary_emb_base", "rope_theta", 12345.5),
    ("rope_local_base_freq", "local", 12345.5),
    ("partial_rotary_factor", "partial_rotary_factor", 0.6875),
    ("rotary_pct", "partial_rotary_factor", 0.6875),
    ("original_max_position_embeddings", "original_max_position_embeddings", 12345.5),
)


def declare_dtype(path: Path, dtype: torch.dtype) -> None:
    """Change the dtype that a config.json declares, and no other byte of it.

    A file that declares the dtype already, or none at all, is not changed.

    Args:
        path: of the file.
        dtype: of the weights in the same directory.

    Raises:
        CheckpointError: when the file is not text.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"'{path.name}' is not UTF-8 text: save the configuration again.") from None
    name = dtype_name(dtype)
    if declared_dtype(json.loads(text.removeprefix("\ufeff"))) in (None, name):
        return
    path.write_bytes(_DTYPE_FIELD.sub(rf"\g<1>{name}\g<3>", text).encode())


def declare_own_head(path: Path, config: Any) -> None:
    """Say in a config.json that the head is not the embedding, if the file says otherwise than the model's config.

    Releases of transformers before 5, and other readers, would use the embedding and ignore the head in the weights.

    Args:
        path: of the file.
        config: of the model.
    """
    text = path.read_bytes().decode()
    fields = json.loads(text.removeprefix("\ufeff"))
    if fields.get("model_type", config.model_type) != config.model_type:  # that of a larger model
        return
    if is_tied(config) or not is_tied(_read(config, fields)):
        return
    changed, count = _TIED_FIELD.subn(r"\g<1>false", text)
    if not count:  # tied by default
        changed = text.replace("{", '{\n  "tie_word_embeddings": false,', 1)
    path.write_bytes(changed.encode())


def is_tied(config: Any) -> bool:
    """Check if a configuration, or that of its text model, says that the head is the embedding."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def declared_dtype(config: dict[str, Any]) -> str | None:
    """Return the dtype that a configuration declares for its text model, without `torch.`; None for no dtype."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(value := part.get("dtype", part.get("torch_dtype")), str):
            return value.removeprefix("torch.")
    return None


def declare_size(text: str, nbytes: int) -> str:
    """Return the text of an index of weight files with another total size, in bytes."""
    return _TOTAL_SIZE.sub(rf"\g<1>{nbytes}", text)


def add_older_fields(folder: Path, config: Any) -> None:
    """Add the names that releases of transformers before 5, and other readers, know to the files that 5 has written.

    config.json gets `rope_theta`, `rope_scaling` and their kin in addition to `rope_parameters`, `torch_dtype` in
    addition to `dtype`, and other names of renamed fields, if the configuration read from it stays the same.
    tokenizer_config.json gets a class that both know.

    Args:
        folder: holds the files.
        config: that was written.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    longer = _with_older_fields(fields, config)
    first, second = (_read(config, part) for part in (fields, longer))
    if _select(first.to_dict(), fields) == _select(second.to_dict(), fields):
        path.write_text(to_json(longer, indent=2, sort_keys=True) + "\n")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(extra := settings.get("extra_special_tokens"), list):
            del settings["extra_special_tokens"]
            settings["additional_special_tokens"] = extra
        path.write_text(to_json(settings, indent=2, ensure_ascii=False) + "\n")


def _with_older_fields(fields: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the fields of a configuration and its parts with those for older readers."""
    longer = {
        name: _with_older_fields(value, getattr(config, name))
        if isinstance(value, dict) and hasattr(getattr(config, name, None), "to_dict")
        else value
        for name, value in fields.items()
    }
    if "dtype" in longer:
        longer.setdefault("torch_dtype", longer["dtype"])
    for name, renamed in getattr(type(config), "attribute_map", {}).items():
        if renamed in longer:
            longer.setdefault(name, longer[renamed])
    if not isinstance(rope := longer.get("rope_parameters"), dict):
        return longer
    values = _rope_values(rope)
    for name, key, probe in _ROPE_FIELDS:
        if key in values and _reads(config, fields, name, probe):
            longer.setdefault(name, values[key])
    if "rope_theta" in values:
        longer["rope_scaling"] = _rope_scaling(rope.get("full_attention", rope))
    return longer


def _rope_values(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a rope by key, with the base of a second rope, for sliding windows, as `local`."""
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    values = dict(full)
    if "rope_theta" in sliding:
        values["local"] = sliding["rope_theta"]
    return values


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Return the scaling of a rope in the form of releases before 5; None for a plain rope."""
    kind = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if kind == "longrope":
        # Phi-3 took these three keys and no others; the original length is a field of the configuration.
        return {"type": kind, "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    return None if kind == "default" else scaling


def _reads(config: Any, fields: dict[str, Any], name: str, probe: float) -> bool:
    """Check if the class of a configuration takes a number of its rope from a field of that name."""
    others = {key: value for key, value in fields.items() if key not in ("rope_parameters", "rope_scaling")}
    try:
        read = _read(config, {**others, name: probe})
    except Exception:  # the checks of a class may need the fields that are left out
        return False
    rope = read.rope_parameters
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any(probe in [value for value in part.values() if isinstance(value, float)] for part in parts)


def _select(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the values of some fields and of their parts, without `type`, an older name of `rope_type`."""
    return {
        name: _select(values[name], part) if isinstance(part, dict) and isinstance(values.get(name), dict) else value
        for name, part in fields.items()
        if (value := values.get(name)) is not None and (name != "type" or "rope_type" not in fields)
    }


def _read(config: Any, fields: dict[str, Any]) -> Any:
    """Return a configuration of the same class with the fields of a file, which stay unchanged."""
    return type(config).from_dict(decode_floats(fields))


def decode_floats(value: Any) -> Any:
    """Return a copy of a JSON value in which infinities are numbers; transformers 5 writes them as objects."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: decode_floats(part) for name, part in value.items()}
    return [decode_floats(part) for part in value] if isinstance(value, list) else value
