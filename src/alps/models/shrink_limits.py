"""Limits of structured pruning: the numbers of units that the family of a model, and the model itself, allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.shrink_families import family_of
from alps.models.shrink_layout import Family
from alps.models.structure import Structure, Target

# Channels of a fused expert are read in strides of 16 bytes, 8 numbers of 16 bits.
_EXPERT_ALIGNMENT = 8


def check_numbers(model: nn.Module, structure: Structure, target: Target) -> None:
    """Refuse a target whose numbers the family or the model does not allow.

    Raises:
        UnsupportedModel: for units that cannot be removed from models of the family.
        ConfigError: for numbers out of range.
    """
    family, complete = family_of(model), target.complete(structure)
    _check_width(family, structure, complete)
    _check_heads(model, family, structure, complete)
    _check_experts(family, structure, complete)
    _check_blocks(structure, complete)


def needs_mistral(model: nn.Module, structure: Structure, target: Target) -> bool:
    """Check if a LLaMA with these heads can be saved as Mistral only."""
    family, complete = family_of(model), target.complete(structure)
    changed = (complete.heads, complete.kv_heads) != (structure.heads, structure.kv_heads)
    return changed and family.heads == "divisor" and structure.hidden % (complete.heads or 1) != 0


def _refusal(family: Family, structure: Structure, units: str, reason: str) -> UnsupportedModel:
    """Return the error for units that cannot be removed; it names those that can."""
    can = {
        "MLP channels": structure.mlp_width is not None and not family.no_width,
        "heads": not family.no_heads,
        "experts": structure.experts is not None,
    }
    others = " and ".join([name for name, is_possible in can.items() if is_possible] + ["blocks"])
    return UnsupportedModel(
        f"{units} of '{family.model_type}' models cannot be removed: {reason}; {others} can be removed."
    )


def _check_range(name: str, kept: int | None, present: int | None) -> None:
    if kept is not None and present is None:
        raise ConfigError(f"The model has no {name} that could be removed: leave their number out.")
    if kept is not None and present is not None and not 1 <= kept <= present:
        raise ConfigError(f"{kept} {name} cannot be kept of {present}: choose a number from 1 to {present}.")


def _check_width(family: Family, structure: Structure, target: Target) -> None:
    _check_range("MLP channels", target.mlp_width, structure.mlp_width)
    if target.mlp_width != structure.mlp_width and family.no_width:
        raise _refusal(family, structure, "MLP channels", family.no_width)


def _check_heads(model: nn.Module, family: Family, structure: Structure, target: Target) -> None:
    _check_range("query heads", target.heads, structure.heads)
    _check_range("KV heads", target.kv_heads, structure.kv_heads)
    if (target.heads, target.kv_heads) == (structure.heads, structure.kv_heads):
        return
    heads, kv_heads = target.heads or 0, target.kv_heads or 1
    if family.no_heads:
        raise _refusal(family, structure, "Heads", family.no_heads)
    if heads % kv_heads or heads // kv_heads > structure.group:
        raise ConfigError(
            f"{heads} query heads cannot share {kv_heads} KV heads equally, at most {structure.group} on each: choose "
            f"one of {', '.join(str(kv_heads * share) for share in range(1, structure.group + 1))}."
        )
    if family.heads == "free" or structure.hidden % heads == 0:
        return
    config: Any = model.config
    has_bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if not family.as_mistral or has_bias:
        raise UnsupportedModel(
            f"transformers takes no '{family.model_type}' model with {heads} heads, which do not divide its hidden "
            f"size of {structure.hidden}: choose a divisor."
        )


def _check_experts(family: Family, structure: Structure, target: Target) -> None:
    if family.no_experts and target.experts is not None:
        raise _refusal(family, structure, "Experts", family.no_experts)
    _check_range("experts", target.experts, structure.experts)
    _check_range("channels of an expert", target.expert_width, structure.expert_width)
    if family.experts is None or target.experts is None or structure.experts is None:
        return
    if target.expert_width != structure.expert_width and (target.expert_width or 0) % _EXPERT_ALIGNMENT:
        raise ConfigError(
            f"Experts with {target.expert_width} channels cannot be multiplied in groups: choose a multiple of "
            f"{_EXPERT_ALIGNMENT}."
        )
    groups, per_token = structure.expert_groups, structure.experts_per_token or 1
    if target.experts % groups:
        raise ConfigError(
            f"{target.experts} experts cannot be kept of {structure.experts} in {groups} groups of equal size: choose "
            f"a multiple of {groups}."
        )
    in_group = target.experts // groups
    minimum = max(family.experts.group_minimum, -(-per_token // structure.groups_per_token))
    if target.experts != structure.experts and in_group < minimum:
        raise ConfigError(
            f"{target.experts} experts are too few, since a token is sent to {per_token}: keep {groups * minimum} or "
            "more."
        )


def _check_blocks(structure: Structure, target: Target) -> None:
    kept = target.kept_blocks or ()
    if not kept or list(kept) != sorted({*kept} & {*range(structure.blocks)}):
        raise ConfigError(
            f"Blocks {list(kept)} cannot be kept of a model with blocks 0 to {structure.blocks - 1}: name each once, "
            "in ascending order."
        )
