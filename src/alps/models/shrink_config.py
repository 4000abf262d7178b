"""Configuration of a smaller model: the same as that of its source, but for the numbers of what was removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers import MistralConfig

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.config_fields import replace_fields
from alps.models.config_json import decode_floats
from alps.models.shrink_families import family_of
from alps.models.shrink_layout import Family
from alps.models.shrink_limits import needs_mistral
from alps.models.structure import Structure, Target

# Fields with one entry for every block.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
# Fields with the numbers of some blocks.
_NUMBERS = ("mlp_only_layers", "moe_layers")
# Fields with the number of leading blocks that differ from those behind them.
_LEADING = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
# Fields with the number of layers behind the blocks that predict further tokens; no causal language model has them.
_EXTRA = ("num_nextn_predict_layers",)
# Fields of LLaMA that Mistral does not have; the biases are false.
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")
# Fields that depend on who has read or written a configuration.
_PROVENANCE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def shrunk_config(model: nn.Module, structure: Structure, target: Target) -> Any:
    """Return the configuration of a smaller model, of the class of the source or of Mistral.

    Args:
        model: the source.
        structure: of the source.
        target: that the family allows.

    Raises:
        ConfigError: when transformers refuses the numbers.
    """
    config: Any = model.config
    new = _shrink(config, family_of(model), structure, target, needs_mistral(model, structure, target))
    new._attn_implementation = config._attn_implementation
    new._name_or_path = config._name_or_path
    new.dtype = config.dtype
    return new


def edit_config_text(text: str, model: nn.Module, structure: Structure, target: Target) -> str:
    """Return the text of the source's config.json with other values for the fields that change, and no other change.

    Args:
        text: of the source's config.json, without a byte order mark.
        model: the source.
        structure: of the source.
        target: that the family allows.

    Raises:
        UnsupportedModel: when the file describes a larger model, of which the source is a part.
    """
    config: Any = model.config
    fields = json.loads(text)
    if fields.get("model_type", config.model_type) != config.model_type:
        raise UnsupportedModel(
            f"The checkpoint holds a '{fields['model_type']}' model, of which '{config.model_type}' is a part: save "
            "that part alone first."
        )
    source = type(config).from_dict(decode_floats(fields))
    new = _shrink(source, family_of(model), structure, target, needs_mistral(model, structure, target))
    expected, before = _values(new), _values(source)
    changed = {name: value for name, value in expected.items() if name not in before or before[name] != value}
    if type(new) is not type(config):
        # Releases since 5 take tokenizers of Mistral models from earlier ones for faulty, and say so.
        changed["transformers_version"] = expected["transformers_version"] = transformers.__version__
    names = {_written_name(name, fields, config): name for name in changed}
    text = replace_fields(text, {name: expected[field] for name, field in names.items() if name in fields})
    # What a file leaves out may follow from other fields; if it does not, it is added.
    read = _values(type(new).from_dict(decode_floats(json.loads(text))))
    read.setdefault("transformers_version", json.loads(text).get("transformers_version"))
    missing = {name: value for name, value in expected.items() if name not in read or read[name] != value}
    return replace_fields(text, missing) if missing else text


def _shrink(config: Any, family: Family, structure: Structure, target: Target, as_mistral: bool) -> Any:
    """Return a new configuration; that of the source does not change."""
    target = target.complete(structure)
    values = {**config.to_dict(), **_width_fields(config, family, structure, target)}
    kept = target.kept_blocks or ()
    values.update({name: 0 for name in _EXTRA if values.get(name)})
    if len(kept) < structure.blocks:
        values.update(_depth_fields(values, family, structure, kept))
    kind = type(config)
    if as_mistral:
        kind = MistralConfig
        values = {name: value for name, value in values.items() if name not in _LLAMA_ONLY}
        values.update(model_type="mistral", sliding_window=None)
        if values.get("architectures"):
            values["architectures"] = ["MistralForCausalLM"]
    try:
        return kind.from_dict(values)
    except Exception as error:  # checks of huggingface_hub and of the classes raise errors of many kinds
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ConfigError(
            f"transformers refuses a '{config.model_type}' model with these numbers ({reason})."
        ) from None


def _width_fields(config: Any, family: Family, structure: Structure, target: Target) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if family.mlp is not None and target.mlp_width != structure.mlp_width:
        fields[str(family.mlp.field)] = target.mlp_width
    if (target.heads, target.kv_heads) != (structure.heads, structure.kv_heads):
        fields["num_attention_heads"] = target.heads
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = target.kv_heads
        if family.attention is not None and family.attention.head_dim is not None:
            fields[family.attention.head_dim] = structure.head_dim
    if (experts := family.experts) is not None:
        if target.experts != structure.experts:
            fields[experts.count] = target.experts
        if target.expert_width != structure.expert_width:
            fields[experts.width] = target.expert_width
    renamed = type(config).attribute_map
    return {renamed.get(name, name): value for name, value in fields.items()}


def _depth_fields(values: dict[str, Any], family: Family, structure: Structure, kept: Sequence[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {family.depth: len(kept)}
    for name in _PER_BLOCK:
        if isinstance(entries := values.get(name), list) and len(entries) == structure.blocks:
            fields[name] = [entries[block] for block in kept]
    for name in _NUMBERS:
        if isinstance(numbers := values.get(name), list):
            fields[name] = [new for new, block in enumerate(kept) if block in numbers]
    for name in _LEADING:
        if isinstance(count := values.get(name), int) and count < structure.blocks:
            fields[name] = sum(block < count for block in kept)
    if isinstance(last := values.get("moe_layer_end_index"), int) and last >= 0:
        fields["moe_layer_end_index"] = sum(block <= last for block in kept) - 1
    if (step := values.get("decoder_sparse_step", 1)) > 1:
        # Blocks are sparse when their number and the step say so; the list of the others needs no step.
        dense = [block for block in range(structure.blocks) if (block + 1) % step]
        dense = sorted({*dense, *values["mlp_only_layers"]})
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [n for n, block in enumerate(kept) if block in dense]}
    if "attention_types" in values:  # of GPT-Neo: kinds of attention, and how often they repeat
        fields["attention_types"] = [[fields["attention_layers"], 1]]
    return fields


def _written_name(name: str, fields: dict[str, Any], config: Any) -> str:
    """Return the name of a field in a file, which may be an older one."""
    aliases = [alias for alias, field in type(config).attribute_map.items() if field == name]
    return next((alias for alias in aliases if alias in fields and name not in fields), name)


def _values(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _PROVENANCE}
