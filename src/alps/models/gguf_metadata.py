"""Hyper-parameters of a GGUF file, compared with the configuration that transformers makes of it.

transformers reads some keys of a file and drops the others. Every key is compared here. A value that the configuration
has a place for is written there; any other is refused, unless it has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.gguf_rope import carry_rope, is_close

# Tensors with factors of rotary frequencies.
_FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Key without the architecture, and the names that configurations of transformers have for it.
_FIELDS: dict[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "expert_feed_forward_length": ("moe_intermediate_size", "expert_hidden_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "leading_dense_block_count": ("first_k_dense_replace", "num_dense_layers"),
    "logit_scale": ("logit_scale",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "router_logit_softcapping": ("router_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "full_attention_interval": ("full_attention_interval",),
    "use_parallel_residual": ("use_parallel_residual",),
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "norm_eps", "layer_norm_eps"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.key_length": ("head_dim",),
    "ssm.conv_kernel": ("conv_kernel", "linear_conv_kernel_dim"),
    "ssm.state_size": ("state_size", "linear_key_head_dim"),
    "ssm.time_step_rank": ("time_step_rank", "linear_num_value_heads"),
    "ssm.group_count": ("n_groups", "linear_num_key_heads"),
    "shortconv.l_cache": ("conv_L_cache",),
}
# Architectures whose tensors transformers does not map by name alone.
_OWN_CONVERSIONS = ("qwen35", "qwen35moe", "lfm2")
# Keys that say nothing about what the model computes.
_NO_EFFECT = {"vocab_size", "tensor_data_layout", "nextn_predict_layers", "pooling_type"}
_ONE_IS_NEUTRAL = {"expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale"}
_GATES = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True)
class GgufMetadata:
    """Hyper-parameters of a GGUF file.

    Attributes:
        architecture: prefix of the keys, such as `llama`.
        values: by key without the prefix.
        factors: values of the tensors that divide rotary frequencies, by name.
        tensors: names of all tensors.
    """

    architecture: str
    values: Mapping[str, Any]
    factors: Mapping[str, list[float]] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()


def read_gguf_metadata(path: Path) -> GgufMetadata:
    """Read the hyper-parameters of a GGUF file.

    Raises:
        ConfigError: without the package gguf, or for a file that is damaged or one of several parts.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError(f"Model '{path}' needs the package gguf: run pip install 'alps-prune[demo]'.") from None
    try:
        reader = _bounded(GGUFReader)(path)
        architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{architecture}."
        values = {
            name.removeprefix(prefix): item.contents()
            for name, item in reader.fields.items()
            if name.startswith(prefix)
        }
        factors = {
            tensor.name: [float(value) for value in tensor.data.reshape(-1)]
            for tensor in reader.tensors
            if tensor.name in _FACTOR_TENSORS
        }
    except Exception as error:  # a damaged file makes the reader raise anything
        raise ConfigError(
            f"Model '{path}' is damaged or no GGUF file ({type(error).__name__}): fetch it again."
        ) from None
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise ConfigError(
            f"Model '{path}' is one of {int(parts.contents())} parts: join them with `llama-gguf-split --merge`."
        )
    return GgufMetadata(architecture, values, factors, tuple(tensor.name for tensor in reader.tensors))


def _bounded(reader_class: Any) -> Any:
    """Return a class of readers that raises where a file promises more than it holds.

    The package's own reader takes numbers behind the end for empty ones, and a damaged length makes it read on until
    memory runs out.
    """

    class BoundedReader(reader_class):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *options: Any, **more: Any) -> Any:
            values = super()._get(offset, dtype, count, *options, **more)
            if len(values) < count:
                raise ValueError("the file ends inside a field")
            return values

    return BoundedReader


def check_uniform(metadata: GgufMetadata, name: str) -> None:
    """Refuse a file whose blocks differ in size, of which transformers makes no configuration.

    Raises:
        UnsupportedModel: naming the first key with one value for every block.
    """
    for key, value in metadata.values.items():
        if key in _FIELDS and isinstance(value, list):
            raise _refusal(metadata, key, value, name)


def complete_config(config: Any, metadata: GgufMetadata, name: str) -> None:
    """Write the hyper-parameters of a file into the configuration that transformers made of it.

    Args:
        config: changed in place where the file says otherwise.
        metadata: of the file.
        name: of the model, for messages.

    Raises:
        UnsupportedModel: naming the first key whose value the configuration has no place for.
    """
    text = config.get_text_config()
    for key, value in metadata.values.items():
        # Head sizes come before what is derived from them.
        if key == "attention.key_length" and not _carry(text, key, value):
            raise _refusal(metadata, key, value, name)
    if (refused := carry_rope(text, metadata.values, metadata.factors)) is not None:
        raise _refusal(metadata, refused, metadata.values.get(refused), name)
    for key, value in metadata.values.items():
        if not key.startswith("rope.") and not _carry(text, key, value):
            raise _refusal(metadata, key, value, name)


def check_tensors(model: Any, metadata: GgufMetadata, name: str) -> None:
    """Refuse a file with biases or norms that the model of transformers does not have, and that its reader drops.

    Args:
        model: loaded from the file.
        metadata: of the file.
        name: of the model, for the message.

    Raises:
        UnsupportedModel: naming the first such tensor.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = [key for key, word in MODEL_ARCH_NAMES.items() if word == metadata.architecture]
    if not architectures or metadata.architecture in _OWN_CONVERSIONS:
        return
    names = get_tensor_name_map(architectures[0], model.config.get_text_config().num_hidden_layers)
    places = set()
    for parameter in model.state_dict():
        base, _, ending = parameter.rpartition(".")
        parts = base.split(".")
        # Names in the file are those of the base model, or of the whole one.
        candidates = (names.get_name(".".join(parts[i:])) for i in range(len(parts)))
        places |= {f"{place}.{ending}" for place in candidates if place is not None}
    for tensor in metadata.tensors:
        if tensor.endswith((".bias", "_norm.weight")) and tensor not in places:
            raise UnsupportedModel(
                f"Model '{name}' has the tensor {tensor} in its GGUF file, for which {type(model).__name__} of "
                "transformers has no place: use the original checkpoint in safetensors."
            )


def _refusal(metadata: GgufMetadata, key: str, value: Any, name: str) -> UnsupportedModel:
    shown = key if key in _FACTOR_TENSORS else f"{metadata.architecture}.{key} = {_short(value)}"
    return UnsupportedModel(
        f"Model '{name}' has {shown} in its GGUF file, for which the configuration of transformers has no place: "
        "use the original checkpoint in safetensors."
    )


def _short(value: Any) -> str:
    words = f"{value:g}" if isinstance(value, float) else str(value)
    return words if len(words) <= 60 else f"{words[:60]}..."


def _carry(config: Any, key: str, value: Any) -> bool:
    """Write one value into the configuration; False if it has no place there and is not without effect."""
    if key in _NO_EFFECT:
        return True
    if (special := _SPECIAL.get(key)) is not None:
        return special(config, value)
    if is_neutral(value) or (key in _ONE_IS_NEUTRAL and value == 1):
        value = None if is_neutral(value) else value
    names = [name for name in _FIELDS.get(key, ()) if hasattr(config, name)]
    if not names:
        neutral = value is None or (key in _ONE_IS_NEUTRAL and value == 1)
        return neutral or key == "context_length" or _is_derived(config, key, value)
    current = getattr(config, names[0])
    if is_close(current, value) or (value is None and (not current or _is_size(key))):
        return True
    if current is None and _is_derived(config, key, value):
        return True
    return _set(config, names[0], value)


def _set(config: Any, name: str, value: Any) -> bool:
    """Change a field; False if the configuration does not take the value."""
    try:
        setattr(config, name, value)
    except Exception:  # fields check their types, and raise errors of several packages
        return False
    return True


def is_neutral(value: Any) -> bool:
    """Check if a value stands for a feature that is switched off."""
    return value in (None, 0, False, "", "none") or value == []


def _is_size(key: str) -> bool:
    return key.endswith(("_length", "_count", "_epsilon")) or key.startswith("ssm.")


def _is_derived(config: Any, key: str, value: Any) -> bool:
    """Check if a size that a configuration leaves open follows from others."""
    sizes = {"attention.key_length": _head_dim(config), "feed_forward_length": 4 * config.hidden_size}
    return key in sizes and bool(sizes[key] == value)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // max(config.num_attention_heads, 1))


def _value_length(config: Any, value: Any) -> bool:
    return bool(value == (getattr(config, "v_head_dim", None) or _head_dim(config)))


def _block_count(config: Any, value: Any) -> bool:
    # Blocks that predict further tokens are counted by the file, and are no part of the decoder.
    return bool(value >= config.num_hidden_layers)


def _kv_heads(config: Any, value: Any) -> bool:
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    counts = set(value) - {0} if isinstance(value, list) else {value}
    return counts <= {heads, 0}


def _attention_scale(config: Any, value: Any) -> bool:
    if is_neutral(value):
        return True
    if hasattr(config, "attention_multiplier"):
        return _set(config, "attention_multiplier", value)
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        scalar = round(value**-2)
        if is_close(value, config.query_pre_attn_scalar**-0.5):
            return True
        return is_close(value, scalar**-0.5) and _set(config, "query_pre_attn_scalar", scalar)
    return is_close(value, _head_dim(config) ** -0.5)


def _sliding_window(config: Any, value: Any) -> bool:
    limit = getattr(config, "max_position_embeddings", None)
    if is_neutral(value) or value == getattr(config, "sliding_window", None) or (limit and value >= limit):
        return True
    if getattr(config, "sliding_window", None) is None:
        return False
    return _set(config, "sliding_window", value)


def _sliding_window_pattern(config: Any, value: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if is_neutral(value):
        return True
    if not isinstance(value, list) or types is None or len(value) != len(types):
        return False
    return [kind == "sliding_attention" for kind in types] == [bool(sliding) for sliding in value]


def _gate(config: Any, value: Any) -> bool:
    gate = _GATES.get(value)
    if is_neutral(value) or gate == getattr(config, "scoring_func", None):
        return True
    # Experts are chosen by a softmax where a configuration has no word for it.
    return gate == "softmax" and not hasattr(config, "scoring_func")


def _alibi(config: Any, value: Any) -> bool:
    # The slopes of BLOOM, MPT and Falcon are those of this value.
    alibi = config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))
    return is_neutral(value) or (alibi and is_close(value, 8.0))


def _inner_size(config: Any, value: Any) -> bool:
    if (heads := getattr(config, "linear_num_value_heads", None)) is not None:
        return bool(value == heads * config.linear_value_head_dim)
    return bool(value == getattr(config, "intermediate_size", None))


_SPECIAL: dict[str, Callable[[Any, Any], bool]] = {
    "block_count": _block_count,
    "attention.head_count_kv": _kv_heads,
    "attention.value_length": _value_length,
    "attention.scale": _attention_scale,
    "attention.sliding_window": _sliding_window,
    "attention.sliding_window_pattern": _sliding_window_pattern,
    "attention.max_alibi_bias": _alibi,
    "attention.causal": lambda _, value: bool(value),
    "expert_gating_func": _gate,
    "ssm.inner_size": _inner_size,
}
