"""Slices of a block's tensors: what stays when MLP channels and heads are removed, and the same as zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.shrink_families import Attention, Cut, Family, Mlp, Unit, cuts_of
from alps.models.sites import Site
from alps.models.structure import Structure, unit_size


@dataclass(frozen=True)
class Kept:
    """Units of one block that stay, as ascending numbers; None for all of them.

    Attributes:
        channels: of the dense MLP.
        heads: query heads, equally many of each kept KV head.
        kv_heads: key and value heads.
    """

    channels: Tensor | None = None
    heads: Tensor | None = None
    kv_heads: Tensor | None = None

    def units(self, unit: Unit) -> Tensor | None:
        """Return the numbers of the units of one kind that stay."""
        return {"channel": self.channels, "head": self.heads, "kv_head": self.kv_heads}[unit]


@dataclass(frozen=True)
class OutputSites:
    """Linear maps of a block whose inputs are the units that can be removed; None for those that it lacks.

    Attributes:
        mlp: second projection of the dense MLP.
        attention: output projection of the attention; also None where heads cannot be removed.
    """

    mlp: Site | None
    attention: Site | None


def sites_of(block: Block, family: Family) -> OutputSites:
    """Find the output projections in a block of a family."""
    sites = {site.name: site for site in block.sites}

    def site(part: Mlp | Attention | None) -> Site | None:
        return None if part is None else sites.get(f"{block.name}.{part.outer}")

    return OutputSites(mlp=site(family.mlp), attention=site(family.attention))


def slice_block(tensors: Mapping[str, Tensor], family: Family, structure: Structure, kept: Kept) -> dict[str, Tensor]:
    """Slice the tensors of a block.

    Args:
        tensors: state of the block, by name inside it.
        family: of the model.
        structure: of the model that the block belongs to.
        kept: units that stay.

    Returns:
        All tensors of the smaller block by the same names; those that do not change are the same objects.
    """
    sliced = dict(tensors)
    for cut in cuts_of(family):
        if cut.tensor in sliced and (index := _rows(cut, tensors[cut.tensor], structure, kept)) is not None:
            tensor = sliced[cut.tensor]
            sliced[cut.tensor] = tensor.index_select(cut.axis, index.to(tensor.device))
    return sliced


def mask_block(module: nn.Module, family: Family, structure: Structure, kept: Kept) -> None:
    """Set all weights of a full block to zero that read removed channels and heads, in place.

    Its outputs are those of the sliced block.

    Args:
        module: the block.
        family: of the model.
        structure: of the model.
        kept: units that stay.
    """
    outer = [part.outer for part in (family.mlp, family.attention) if part is not None]
    state = module.state_dict()
    for cut in cuts_of(family):
        if cut.tensor.removesuffix(".weight") in outer and cut.tensor in state:
            index = _rows(cut, state[cut.tensor], structure, kept)
            if index is not None:
                removed = torch.ones(state[cut.tensor].shape[cut.axis], dtype=torch.bool)
                removed[index] = False
                state[cut.tensor].index_fill_(cut.axis, removed.nonzero().flatten().to(state[cut.tensor].device), 0.0)


def _rows(cut: Cut, tensor: Tensor, structure: Structure, kept: Kept) -> Tensor | None:
    """Return the numbers of the rows along a cut axis that stay; None for all of them."""
    if all(kept.units(unit) is None for unit in cut.runs):
        return None
    size = unit_size(cut, tensor.shape, structure)
    assert size is not None, cut
    rows, start = list[Tensor](), 0
    for unit in cut.runs:
        count, units = structure.count(unit), kept.units(unit)
        assert count is not None
        units = torch.arange(count) if units is None else units.cpu()
        rows.append((start + units[:, None] * size + torch.arange(size)).flatten())
        start += count * size
    return torch.cat(rows)
