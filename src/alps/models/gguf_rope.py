"""Rotary embeddings of a GGUF file as the `rope_parameters` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_PREFIX = "rope.scaling."
# Shapes of Llama 3's curve of factors: low and high wavelength, as all its checkpoints have them.
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_YARN_NUMBERS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")


def is_close(a: Any, b: Any) -> bool:
    """Check if two values are equal, or two numbers within float32's precision."""
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)


def carry_rope(config: Any, values: Mapping[str, Any], factors: Mapping[str, list[float]]) -> str | None:
    """Write a file's rotary embeddings into a configuration.

    Args:
        config: of the text model; its `rope_parameters` are changed where the file says otherwise.
        values: hyper-parameters of the file by key, without the architecture.
        factors: tensors that divide the frequencies, by name.

    Returns:
        The first key or tensor that has no place in the configuration; None when there is none.
    """
    if not any(key.startswith("rope.") for key in values) and not factors:
        return None
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        used = [key for key, value in values.items() if key.startswith("rope.") and not _is_off(key, value)]
        return next(iter([*used, *factors]), None)
    nested = {name: part for name, part in parameters.items() if isinstance(part, dict)}
    full = nested.get("full_attention", parameters)
    sliding = nested.get("sliding_attention", parameters)
    keys = ("freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa", "dimension_sections")
    unknown = (k for k in values if k.startswith("rope.") and not k.startswith(_PREFIX) and k[5:] not in keys)
    for key in unknown:
        if not _is_off(key, values[key]):
            return key
    for key, part in (("rope.freq_base", full), ("rope.freq_base_swa", sliding)):
        if values.get(key) and not is_close(part.get("rope_theta"), values[key]):
            part["rope_theta"] = values[key]
    for key, part in (("rope.dimension_count", full), ("rope.dimension_count_swa", sliding)):
        if values.get(key) and not _carry_dimensions(config, part, values[key]):
            return key
    sections = [size for size in values.get("rope.dimension_sections") or [] if size]
    if sections and sections != full.get("mrope_section"):
        return "rope.dimension_sections"
    refused = _carry_scaling(config, full, values, factors)
    if refused is None and hasattr(config, "validate_rope"):
        config.validate_rope()
    return refused


def _is_off(key: str, value: Any) -> bool:
    return value in (0, False, "", "none", None) or (key.endswith(("factor", "scale_linear")) and value == 1)


def _carry_dimensions(config: Any, parameters: dict[str, Any], count: int) -> bool:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    if count == int(head * share) or count == getattr(config, "rotary_dim", None):
        return True
    if "partial_rotary_factor" not in parameters:
        return False
    parameters["partial_rotary_factor"] = count / head
    return True


def _carry_scaling(
    config: Any, parameters: dict[str, Any], values: Mapping[str, Any], factors: Mapping[str, list[float]]
) -> str | None:
    scaling = {key.removeprefix(_PREFIX): value for key, value in values.items() if key.startswith(_PREFIX)}
    kind = str(scaling.pop("type", "")) or ("linear" if scaling.get("factor") else "none")
    factor = float(scaling.pop("factor", 0) or 1)
    attention = float(scaling.pop("attn_factor", 0) or 1)
    original = int(scaling.pop("original_context_length", 0) or config.max_position_embeddings)
    scaling.pop("finetuned", None)
    yarn = {key: scaling.pop(key) for key in _YARN_NUMBERS if key in scaling}
    for key, value in scaling.items():
        if not _is_off(key, value):
            return _PREFIX + key
    kept = {key: parameters[key] for key in _KEPT if key in parameters}
    if "rope_factors_long.weight" in factors or kind == "longrope":
        scaled = _longrope(config, factors, original, attention)
        if scaled is None:
            return f"{_PREFIX}type"
    elif kind == "yarn":
        if not is_close(yarn.get("yarn_ext_factor", 1.0), 1.0):
            return f"{_PREFIX}yarn_ext_factor"
        scaled = _yarn(factor, original, attention, yarn)
    elif kind in ("none", "linear"):
        if attention != 1:
            return f"{_PREFIX}attn_factor"
        scaled = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    else:
        return f"{_PREFIX}type"
    divisors = factors.get("rope_freqs.weight")
    if divisors is not None and any(not is_close(value, 1.0) for value in divisors):
        if scaled is not None:
            return "rope_freqs.weight"
        scaled = _divided(config, divisors, kept.get("rope_theta", 10_000.0))
    if scaled is not None:
        parameters.clear()
        parameters.update(kept | scaled)
    return None


def _yarn(factor: float, original: int, attention: float, numbers: Mapping[str, float]) -> dict[str, Any]:
    scaled: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    attention *= numbers.get("yarn_attn_factor", 0) or 1
    if attention != 1:
        scaled["attention_factor"] = attention * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
    for key in ("beta_fast", "beta_slow"):
        if (value := numbers.get(f"yarn_{key}", 0)) and value > 0:
            scaled[key] = value
    return scaled


def _longrope(
    config: Any, factors: Mapping[str, list[float]], original: int, attention: float
) -> dict[str, Any] | None:
    long, short = factors.get("rope_factors_long.weight"), factors.get("rope_factors_short.weight")
    if long is None or short is None:
        return None
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
        "factor": config.max_position_embeddings / original,
        "attention_factor": attention,
    }


def _divided(config: Any, divisors: list[float], theta: float) -> dict[str, Any]:
    """Return the parameters of frequencies that are divided one by one; in Llama 3's form if they follow its curve."""
    limit = config.max_position_embeddings
    for original in [8192, *(2**power for power in range(6, 18))]:
        curve = _llama3_divisors(len(divisors), theta, max(divisors), original)
        if original < limit and all(is_close(a, b) for a, b in zip(divisors, curve, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": max(divisors),
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    # Long and short factors are equal: the length of a text does not matter.
    return {
        "rope_type": "longrope",
        "long_factor": divisors,
        "short_factor": divisors,
        "original_max_position_embeddings": limit,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama3_divisors(count: int, theta: float, factor: float, original: int) -> list[float]:
    divisors = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (i / count)
        smooth = (original / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
