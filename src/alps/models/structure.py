"""Structure of a decoder: the numbers of its blocks, MLP channels, heads and experts, and those of a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.blocks import Block
from alps.models.shrink_families import Cut, Family, Unit, cuts_of, family_of


@dataclass(frozen=True)
class Structure:
    """Numbers of units in the blocks of a model, equal in all blocks that have them; None for what no block has.

    Attributes:
        blocks: number of decoder blocks.
        hidden: size of the hidden states.
        mlp_width: channels of a dense MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head; None where heads cannot be removed.
    """

    blocks: int
    hidden: int
    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return (self.heads or 1) // (self.kv_heads or 1)

    def count(self, unit: Unit) -> int | None:
        """Return the number of units of one kind in a block."""
        return {"channel": self.mlp_width, "head": self.heads, "kv_head": self.kv_heads}[unit]


@dataclass(frozen=True)
class Target:
    """Numbers of units that stay; None for all of them.

    Attributes:
        mlp_width: channels of a dense MLP.
        heads: query heads.
        kv_heads: key and value heads.
        kept_blocks: numbers of the blocks that stay, ascending.
    """

    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    kept_blocks: tuple[int, ...] | None = None

    def complete(self, structure: Structure) -> Target:
        """Return the target with a number for everything that a model has.

        KV heads without a number of query heads go with all their query heads. A query head that shares its KV head
        with no other goes with it.
        """
        heads, kv_heads = self.heads, self.kv_heads
        if kv_heads is None:
            kv_heads = heads if structure.group == 1 and heads is not None else structure.kv_heads
        if heads is None:
            heads = structure.heads if structure.kv_heads is None else (kv_heads or 0) * structure.group
        kept = tuple(range(structure.blocks)) if self.kept_blocks is None else self.kept_blocks
        return replace(
            self,
            mlp_width=structure.mlp_width if self.mlp_width is None else self.mlp_width,
            heads=heads,
            kv_heads=kv_heads,
            kept_blocks=kept,
        )


def read_structure(model: nn.Module, blocks: Sequence[Block]) -> Structure:
    """Read the structure of a model from its configuration and from the shapes of its blocks.

    Args:
        model: a causal language model of a known family; its weights may be on the meta device.
        blocks: its decoder blocks.

    Raises:
        UnsupportedModel: for an unknown family, and for blocks whose shapes differ from each other or from what the
            configuration says.
    """
    family, config = family_of(model), _config(model)
    shapes = [{name: tuple(p.shape) for name, p in block.module.state_dict().items()} for block in blocks]
    heads = int(config.num_attention_heads)
    structure = Structure(
        blocks=len(blocks),
        hidden=int(config.hidden_size),
        mlp_width=_mlp_width(family, shapes),
        heads=heads,
        kv_heads=_kv_heads(config, heads),
    )
    if family.attention is not None:
        columns = next(shape[f"{family.attention.outer}.weight"][1] for shape in shapes)
        structure = replace(structure, head_dim=columns // heads)
    for block, shape in zip(blocks, shapes, strict=True):
        for cut in cuts_of(family):
            if cut.tensor in shape and unit_size(cut, shape[cut.tensor], structure) is None:
                raise UnsupportedModel(
                    f"{block.name}.{cut.tensor} has the shape {list(shape[cut.tensor])}, unlike other blocks or the "
                    "configuration: structure can be removed from equal blocks only."
                )
    return structure


def unit_size(cut: Cut, shape: Sequence[int], structure: Structure) -> int | None:
    """Return the rows or columns of one unit along a cut axis; None when the shape is not that of the structure."""
    counts = [structure.count(unit) for unit in cut.runs]
    total = sum(count or 0 for count in counts)
    expected = {"head": structure.head_dim, "kv_head": structure.head_dim}.get(cut.runs[0], 1)
    if None in counts or not total or shape[cut.axis] % total:
        return None
    size = shape[cut.axis] // total
    return size if size in (1, expected) else None


def check_numbers(model: nn.Module, structure: Structure, target: Target) -> None:
    """Refuse a target whose numbers the family or the model does not allow.

    Raises:
        UnsupportedModel: for units that cannot be removed from models of the family.
        ConfigError: for numbers out of range.
    """
    family, complete = family_of(model), target.complete(structure)
    _check_width(family, structure, complete)
    _check_heads(model, family, structure, complete)
    _check_blocks(structure, complete)


def needs_mistral(model: nn.Module, structure: Structure, target: Target) -> bool:
    """Check if a LLaMA with these heads can be saved as Mistral only."""
    family, complete = family_of(model), target.complete(structure)
    changed = (complete.heads, complete.kv_heads) != (structure.heads, structure.kv_heads)
    return changed and family.heads == "divisor" and structure.hidden % (complete.heads or 1) != 0


def _config(model: nn.Module) -> Any:
    return model.config


def _kv_heads(config: Any, heads: int) -> int:
    """Return the number of KV heads; of Falcon's two architectures only the newer one has a field for it."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    names = ("num_key_value_heads", "num_kv_heads")
    return next((int(number) for name in names if (number := getattr(config, name, None))), heads)


def _mlp_width(family: Family, shapes: Sequence[dict[str, tuple[int, ...]]]) -> int | None:
    if family.mlp is None:
        return None
    name, axis = f"{family.mlp.outer}.weight", 0 if family.mlp.inputs_first else 1
    return next((shape[name][axis] for shape in shapes if name in shape), None)


def _check_range(name: str, kept: int | None, present: int | None) -> None:
    if kept is not None and not 1 <= kept <= (present or 0):
        raise ConfigError(f"{kept} {name} cannot be kept of {present or 'none'}: choose a number in between.")


def _check_width(family: Family, structure: Structure, target: Target) -> None:
    _check_range("MLP channels", target.mlp_width, structure.mlp_width)
    if target.mlp_width != structure.mlp_width and family.no_width:
        raise UnsupportedModel(
            f"MLP channels of '{family.model_type}' models cannot be removed: {family.no_width}; remove blocks instead."
        )


def _check_heads(model: nn.Module, family: Family, structure: Structure, target: Target) -> None:
    _check_range("query heads", target.heads, structure.heads)
    _check_range("KV heads", target.kv_heads, structure.kv_heads)
    if (target.heads, target.kv_heads) == (structure.heads, structure.kv_heads):
        return
    heads, kv_heads = target.heads or 0, target.kv_heads or 1
    if family.no_heads:
        raise UnsupportedModel(
            f"Heads of '{family.model_type}' models cannot be removed: {family.no_heads}; remove MLP channels or "
            "blocks."
        )
    if heads % kv_heads or heads // kv_heads > structure.group:
        raise ConfigError(
            f"{heads} query heads cannot share {kv_heads} KV heads equally, at most {structure.group} on each: choose "
            f"one of {', '.join(str(kv_heads * share) for share in range(1, structure.group + 1))}."
        )
    if family.heads == "free" or structure.hidden % heads == 0:
        return
    config = _config(model)
    has_bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if not family.as_mistral or has_bias:
        raise UnsupportedModel(
            f"transformers takes no '{family.model_type}' model with {heads} heads, which do not divide its hidden "
            f"size of {structure.hidden}: choose a divisor."
        )


def _check_blocks(structure: Structure, target: Target) -> None:
    kept = target.kept_blocks or ()
    if not kept or list(kept) != sorted({*kept} & {*range(structure.blocks)}):
        raise ConfigError(
            f"Blocks {list(kept)} cannot be kept of a model with blocks 0 to {structure.blocks - 1}: name each once, "
            "in ascending order."
        )
