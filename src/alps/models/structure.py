"""Structure of a decoder: the numbers of its blocks, MLP channels, heads and experts, and those of a smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block
from alps.models.shrink_families import family_of
from alps.models.shrink_layout import Cut, Family, Unit, cuts_of


@dataclass(frozen=True)
class Structure:
    """Numbers of units in the blocks of a model, equal in all blocks that have them; None for what no block has.

    Attributes:
        blocks: number of decoder blocks.
        hidden: size of the hidden states.
        mlp_width: channels of a dense MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head, as the output projection reads it.
        latent: size of what latent attention caches in place of keys and values; None for other attention.
        experts: routed experts of a mixture.
        expert_width: channels of each expert.
        shared_width: channels of the shared experts together, if these follow from the width of an expert.
        experts_per_token: experts that the router sends a token to.
        expert_groups: groups of a grouped router, else 1.
        groups_per_token: groups that it chooses experts from.
    """

    blocks: int
    hidden: int
    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    latent: int | None = None
    experts: int | None = None
    expert_width: int | None = None
    shared_width: int | None = None
    experts_per_token: int | None = None
    expert_groups: int = 1
    groups_per_token: int = 1

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return (self.heads or 1) // (self.kv_heads or 1)

    @property
    def cached_values(self) -> int:
        """Numbers that a key-value cache holds for each token and block."""
        return self.latent or 2 * (self.kv_heads or 0) * (self.head_dim or 0)

    def count(self, unit: Unit) -> int | None:
        """Return the number of units of one kind in a block."""
        counts: dict[Unit, int | None] = {
            "channel": self.mlp_width,
            "head": self.heads,
            "kv_head": self.kv_heads,
            "expert": self.experts,
            "expert_channel": self.expert_width,
            "shared_channel": self.shared_width,
        }
        return counts[unit]


@dataclass(frozen=True)
class Target:
    """Numbers of units that stay; None for all of them.

    Attributes:
        mlp_width: channels of a dense MLP.
        heads: query heads.
        kv_heads: key and value heads.
        experts: routed experts of each mixture, equally many of each group.
        expert_width: channels of each expert; shared experts become narrower by the same factor.
        kept_blocks: numbers of the blocks that stay, ascending.
    """

    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    expert_width: int | None = None
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
            experts=structure.experts if self.experts is None else self.experts,
            expert_width=structure.expert_width if self.expert_width is None else self.expert_width,
            kept_blocks=kept,
        )

    def shared_width(self, structure: Structure) -> int | None:
        """Return the channels of the shared experts that stay."""
        if structure.shared_width is None or structure.expert_width is None or self.expert_width is None:
            return structure.shared_width
        return structure.shared_width // structure.expert_width * self.expert_width


def read_structure(model: nn.Module, blocks: Sequence[Block]) -> Structure:
    """Read the structure of a model from its configuration and from the shapes of its blocks.

    Args:
        model: a causal language model of a known family; its weights may be on the meta device.
        blocks: its decoder blocks.

    Raises:
        UnsupportedModel: for an unknown family, and for blocks whose shapes differ from each other or from what the
            configuration says.
    """
    family = family_of(model)
    config: Any = model.config
    shapes = [{name: tuple(p.shape) for name, p in block.module.state_dict().items()} for block in blocks]
    sizes: dict[str, tuple[int, ...]] = {}
    for block, shape in zip(blocks, shapes, strict=True):
        for name in {cut.tensor for cut in cuts_of(family)} & shape.keys():
            if sizes.setdefault(name, shape[name]) != shape[name]:
                raise UnsupportedModel(
                    f"{block.name}.{name} has the shape {list(shape[name])}, unlike {list(sizes[name])} in an earlier "
                    "block: structure can be removed from equal blocks only."
                )
    heads = int(config.num_attention_heads)
    structure = Structure(
        blocks=len(blocks),
        hidden=int(config.hidden_size),
        mlp_width=_units(family, sizes, "channel"),
        heads=heads,
        kv_heads=_kv_heads(family, config, heads),
        head_dim=_head_dim(family, config, sizes, heads),
        latent=config.kv_lora_rank + config.qk_rope_head_dim if _is_latent(family) else None,
        experts=_units(family, sizes, "expert"),
        expert_width=_units(family, sizes, "expert_channel"),
        shared_width=_units(family, sizes, "shared_channel"),
    )
    if family.experts is None or structure.experts is None:
        return structure
    return replace(
        structure,
        experts_per_token=int(getattr(config, family.experts.per_token)),
        expert_groups=int(getattr(config, "n_group", None) or 1),
        groups_per_token=int(getattr(config, "topk_group", None) or 1),
    )


def _units(family: Family, sizes: Mapping[str, tuple[int, ...]], unit: Unit) -> int | None:
    """Return the number of units in a block, which an axis with one run of them has; None when no block has any."""
    lengths = (sizes[cut.tensor][cut.axis] for cut in cuts_of(family) if cut.runs == (unit,) and cut.tensor in sizes)
    return next(lengths, None)


def unit_size(cut: Cut, shape: Sequence[int], structure: Structure) -> int:
    """Return the rows or columns of one unit along a cut axis."""
    counts = [structure.count(unit) or 0 for unit in cut.runs]
    assert sum(counts) and shape[cut.axis] % sum(counts) == 0, cut
    return shape[cut.axis] // sum(counts)


def _is_latent(family: Family) -> bool:
    return family.attention is not None and family.attention.head_dim is None


def _head_dim(family: Family, config: Any, sizes: Mapping[str, tuple[int, ...]], heads: int) -> int:
    if family.attention is not None:
        return sizes[f"{family.attention.outer}.weight"][1] // heads
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _kv_heads(family: Family, config: Any, heads: int) -> int:
    """Return the number of KV heads; of Falcon's two architectures only the newer one has a field for it.

    Latent attention computes keys and values for each query head.
    """
    if _is_latent(family):
        return heads
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    names = ("num_key_value_heads", "num_kv_heads")
    return next((int(number) for name in names if (number := getattr(config, name, None))), heads)
