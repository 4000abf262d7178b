"""Numbers of units of a smaller model from the shares and numbers of the settings, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from alps.core.errors import ConfigError, UnsupportedModel
from alps.core.text_format import format_size
from alps.models.shrink_layout import Family
from alps.models.structure import Structure, Target
from alps.pruning.block_removal import PROTECTED_ENDS, removable
from alps.pruning.shrink_config import ShrinkConfig
from alps.reporting.shrink_report import SizeRecord

_ALIGNMENTS = (256, 128, 64)
# Widths of experts may be multiples of 8 only.
_EXPERT_ALIGNMENTS = (*_ALIGNMENTS, 8)
# Rows of weights that K-quants of llama.cpp code together.
_K_QUANT = 256


def resolve_target(config: ShrinkConfig, structure: Structure) -> Target:
    """Return the numbers of units that stay; of blocks that are still to be chosen, the first candidates go.

    Raises:
        ConfigError: when nothing would be removed, or more than there is.
    """
    config.check_cuts()
    target = Target(
        mlp_width=_width(config, structure),
        heads=_heads(config, structure),
        kv_heads=config.kv_groups,
        experts=_experts(config, structure),
        expert_width=_expert_width(config, structure),
        kept_blocks=_kept_blocks(config, structure),
    ).complete(structure)
    if target == Target().complete(structure):
        raise ConfigError("Nothing would be removed: the settings keep everything that the model has.")
    return target


def check_experts(config: ShrinkConfig, family: Family, structure: Structure) -> None:
    """Refuse to remove experts from a model that has none, or whose family does not allow it.

    Raises:
        ConfigError: for a model without experts.
        UnsupportedModel: for a family whose experts cannot be removed.
    """
    for name in ("experts", "num_experts", "expert_mlp", "expert_mlp_width"):
        if getattr(config, name) is None or structure.experts is not None:
            continue
        if family.no_experts:
            raise UnsupportedModel(
                f"Experts of '{family.model_type}' models cannot be removed: {family.no_experts}; remove blocks "
                "instead."
            )
        raise ConfigError(f"--{name.replace('_', '-')} is for mixtures of experts, and the model has no experts.")


def _experts(config: ShrinkConfig, structure: Structure) -> int | None:
    """Return how many experts stay: of a share the nearest number that the groups and the router allow."""
    if config.experts is None or structure.experts is None:
        return config.num_experts
    groups, count = structure.expert_groups, structure.experts
    per_group = int((1 - config.experts) * count / groups + 0.5)
    kept = groups * max(per_group, -(-(structure.experts_per_token or 1) // structure.groups_per_token))
    if kept >= count:
        raise ConfigError(
            f"--experts {config.experts:g} of {count} experts in {groups} groups, of which a token takes "
            f"{structure.experts_per_token}, rounds to nothing: give more."
        )
    return kept


def _expert_width(config: ShrinkConfig, structure: Structure) -> int | None:
    if config.expert_mlp is None or structure.expert_width is None:
        return config.expert_mlp_width
    return aligned("--expert-mlp", config.expert_mlp, structure.expert_width, config.align, steps=_EXPERT_ALIGNMENTS)


def _width(config: ShrinkConfig, structure: Structure) -> int | None:
    if config.mlp is None:
        return config.mlp_width
    if structure.mlp_width is None:
        raise ConfigError("--mlp removes channels of dense MLPs, and the model has none.")
    return aligned("--mlp", config.mlp, structure.mlp_width, config.align)


def aligned(option: str, share: float, width: int, align: int | None, *, steps: Sequence[int] = _ALIGNMENTS) -> int:
    """Return the width that stays of a share that goes, rounded to a multiple.

    Args:
        option: that gave the share, for the message.
        share: of the width that goes.
        width: of the dense model.
        align: multiple; None for the first of `steps` of which the width is a multiple, or the last.
        steps: multiples to choose from.

    Raises:
        ConfigError: when nothing would go.
    """
    step = width_step(width, align, steps)
    # Halves are rounded up, so that rather less than the share goes.
    kept = max(int((1 - share) * width / step + 0.5), 1) * step
    if kept >= width:
        raise ConfigError(
            f"{option} {share:g} of {width} rounds to nothing in multiples of {step}: give more, or a smaller --align."
        )
    return kept


def width_step(width: int, align: int | None, steps: Sequence[int] = _ALIGNMENTS) -> int:
    """Return the multiple to which a width is rounded: `align`, or the first of `steps` that divides it."""
    return align or next((step for step in steps if width % step == 0), steps[-1])


def _heads(config: ShrinkConfig, structure: Structure) -> int | None:
    if config.kv_groups is not None and config.kv_groups > (structure.kv_heads or 0):
        raise ConfigError(
            f"{config.kv_groups} KV groups cannot be kept of {structure.kv_heads}: give a smaller number."
        )
    if config.heads is None:
        return config.num_heads
    if structure.group == 1:
        return _rounded_heads(config.heads, structure.heads or 1)
    kv_heads = config.kv_groups or structure.kv_heads or 1
    per_group = max(int((1 - config.heads) * structure.group + 0.5), 1)
    if per_group == structure.group:
        raise ConfigError(
            f"--heads {config.heads:g} of {structure.group} query heads in a KV group rounds to nothing: give more, or "
            "--kv-groups."
        )
    return per_group * kv_heads


def _rounded_heads(share: float, heads: int) -> int:
    """Return how many heads stay of a share that goes, each of which has a KV head of its own."""
    kept = max(int((1 - share) * heads + 0.5), 1)
    if kept == heads:
        raise ConfigError(f"--heads {share:g} of {heads} heads rounds to nothing: give more, or --num-heads.")
    return kept


def _kept_blocks(config: ShrinkConfig, structure: Structure) -> tuple[int, ...] | None:
    removed = config.drop_blocks
    if unknown := [index for index in removed if index >= structure.blocks]:
        raise ConfigError(f"--drop-blocks names block {unknown[0]}, and the model has {structure.blocks}, from 0 on.")
    if config.blocks is not None:
        candidates = removable(structure.blocks)
        if config.blocks > len(candidates):
            raise ConfigError(
                f"{config.blocks} blocks cannot be removed of {structure.blocks}: the first and the last "
                f"{PROTECTED_ENDS} stay; name others with --drop-blocks."
            )
        removed = candidates[: config.blocks]
    if not removed:
        return None
    return tuple(index for index in range(structure.blocks) if index not in removed)


def size_record(model: nn.Module, structure: Structure, changed: dict[str, Any]) -> SizeRecord:
    """Measure a model.

    Args:
        model: its weights may be on the meta device.
        structure: of it.
        changed: fields of its configuration to show.
    """
    parameters = list(model.parameters())
    kv_bytes = None
    if structure.kv_heads and structure.head_dim:
        size = next(p for p in parameters if p.is_floating_point()).dtype.itemsize
        kv_bytes = 2 * structure.kv_heads * structure.head_dim * structure.blocks * size
    return SizeRecord(
        parameters=sum(p.numel() for p in parameters),
        nbytes=sum(p.numel() * p.dtype.itemsize for p in parameters),
        kv_bytes=kv_bytes,
        fields=changed,
    )


def changed_fields(before: Any, after: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of two configurations that differ, of each."""
    old, new = before.to_dict(), after.to_dict()
    names = [name for name in new if name in old and old[name] != new[name] and not _says_how_written(name)]
    return {name: old[name] for name in names}, {name: new[name] for name in names}


def _says_how_written(name: str) -> bool:
    """Check if a field depends on who has written the configuration, or in which dtype."""
    return name.startswith("_") or name in ("dtype", "transformers_version")


def describe_target(before: SizeRecord, after: SizeRecord, structure: Structure) -> list[str]:
    """Describe the smaller model in lines of text: fields, parameters, bytes, cache, quantisation, parallelism.

    Args:
        before: of the dense model.
        after: of the smaller one.
        structure: of the smaller one.
    """
    fields = ", ".join(
        f"{name} {_short(before.fields.get(name))} -> {_short(value)}" for name, value in after.fields.items()
    )
    removed = 1 - after.parameters / before.parameters
    lines = [
        f"Config: {fields}.",
        f"Parameters: {before.parameters:,} -> {after.parameters:,} ({100 * removed:.1f} % fewer); weights "
        f"{format_size(before.nbytes)} -> {format_size(after.nbytes)}.",
    ]
    if before.kv_bytes is not None and after.kv_bytes is not None:
        lines.append(f"Key-value cache: {before.kv_bytes:,} -> {after.kv_bytes:,} bytes a token.")
    widths = {
        "MLP width": structure.mlp_width,
        "expert width": structure.expert_width,
        "heads x head_dim": (structure.heads or 0) * (structure.head_dim or 0),
    }
    uneven = [f"{name} {width}" for name, width in widths.items() if width and width % _K_QUANT]
    if uneven:
        lines.append(
            f"K-quants of llama.cpp need multiples of {_K_QUANT}: with {' and '.join(uneven)} those layers fall back "
            "to larger formats."
        )
    parts = [
        count for count in (structure.heads, structure.kv_heads, structure.mlp_width, structure.expert_width) if count
    ]
    ranks = [ranks for ranks in (2, 4, 8) if parts and all(count % ranks == 0 for count in parts)]
    lines.append(
        f"Tensor parallelism: {', '.join(map(str, ranks))} ranks divide heads, KV heads and MLP width."
        if ranks
        else "Tensor parallelism: no 2, 4 or 8 ranks divide heads, KV heads and MLP width."
    )
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(value)})" if isinstance(value, list) else text[:40]
