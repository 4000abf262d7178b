"""Slices of a block's tensors: what stays when MLP channels and heads are removed, and the same as zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.shrink_layout import Attention, Cut, Family, Mlp, Unit, cuts_of
from alps.models.sites import Site
from alps.models.structure import Structure, unit_size


@dataclass(frozen=True)
class Kept:
    """Units of one block that stay, as ascending numbers; None for all of them.

    Attributes:
        channels: of the dense MLP.
        heads: query heads, equally many of each kept KV head.
        kv_heads: key and value heads.
        experts: routed experts, equally many of each group.
        expert_channels: of each kept expert, (kept experts, kept channels), ascending in each row.
        shared_channels: of the shared experts, where their width follows from that of an expert.
    """

    channels: Tensor | None = None
    heads: Tensor | None = None
    kv_heads: Tensor | None = None
    experts: Tensor | None = None
    expert_channels: Tensor | None = None
    shared_channels: Tensor | None = None

    def units(self, unit: Unit) -> Tensor | None:
        """Return the numbers of the units of one kind that stay."""
        units: dict[Unit, Tensor | None] = {
            "channel": self.channels,
            "head": self.heads,
            "kv_head": self.kv_heads,
            "expert": self.experts,
            "expert_channel": self.expert_channels,
            "shared_channel": self.shared_channels,
        }
        return units[unit]


@dataclass(frozen=True)
class OutputSites:
    """Linear maps of a block whose inputs are the units that can be removed; None for those that it lacks.

    Attributes:
        mlp: second projection of the dense MLP.
        attention: output projection of the attention; also None where heads cannot be removed.
        experts: second projection of every expert, in order.
        shared: second projection of the shared experts.
    """

    mlp: Site | None
    attention: Site | None
    experts: tuple[Site, ...] = ()
    shared: Site | None = None


def sites_of(block: Block, family: Family) -> OutputSites:
    """Find the output projections in a block of a family."""
    sites = {site.name: site for site in block.sites}

    def site(part: Mlp | Attention | None) -> Site | None:
        return None if part is None else sites.get(f"{block.name}.{part.outer}")

    outputs = OutputSites(mlp=site(family.mlp), attention=site(family.attention))
    if family.experts is None:
        return outputs
    prefix = f"{block.name}.{family.experts.mixture}.experts.down_proj."
    experts = tuple(site for name, site in sites.items() if name.startswith(prefix))
    return replace(outputs, experts=experts, shared=site(family.experts.shared_mlp))


def slice_block(tensors: Mapping[str, Tensor], family: Family, structure: Structure, kept: Kept) -> dict[str, Tensor]:
    """Slice the tensors of a block.

    Args:
        tensors: state of the block, by name inside it.
        family: of the model.
        structure: of the model that the block belongs to.
        kept: units that stay.

    Returns:
        All tensors of the smaller block by the same names; those that do not change are the same objects.

    Raises:
        ValueError: for units that are not ascending, or that leave unequally from KV heads or groups of experts.
    """
    _check_kept(structure, kept)
    sliced = dict(tensors)
    for cut in cuts_of(family):
        if cut.tensor in sliced and (index := _rows(cut, tensors[cut.tensor], structure, kept)) is not None:
            sliced[cut.tensor] = _take(sliced[cut.tensor], index, cut.axis)
    return sliced


def mask_block(module: nn.Module, family: Family, structure: Structure, kept: Kept) -> None:
    """Set all weights of a full block to zero that read removed channels and heads, in place.

    Its outputs are those of the sliced block, if no token is sent to removed experts (`alps.models.routing_mask`).

    Args:
        module: the block.
        family: of the model.
        structure: of the model.
        kept: units that stay.

    Raises:
        ValueError: as in `slice_block`.
    """
    _check_kept(structure, kept)
    shared = None if family.experts is None else family.experts.shared_mlp
    parts = (family.mlp, family.attention, shared)
    outer = [f"{part.outer}.weight" for part in parts if part is not None]
    state = module.state_dict()
    for cut in cuts_of(family):
        if cut.tensor not in state or (index := _rows(cut, state[cut.tensor], structure, kept)) is None:
            continue
        tensor = state[cut.tensor]
        if cut.tensor in outer:
            kept_values = _take(tensor, index, cut.axis)
            tensor.zero_().index_copy_(cut.axis, index.to(tensor.device), kept_values)
        elif cut.runs == ("expert_channel",):
            experts = torch.arange(len(tensor)) if kept.experts is None else kept.experts.cpu()
            for expert, channels in zip(experts.tolist(), index, strict=True):
                kept_values = _take(tensor[expert], channels, cut.axis - 1)
                tensor[expert].zero_().index_copy_(cut.axis - 1, channels.to(tensor.device), kept_values)


def _check_kept(structure: Structure, kept: Kept) -> None:
    units: tuple[Unit, ...] = ("channel", "head", "kv_head", "expert", "shared_channel")
    for unit in units:
        numbers, count = kept.units(unit), structure.count(unit)
        if numbers is not None and not _is_ascending(numbers, count or 0):
            raise ValueError(f"Kept units of the kind '{unit}' are not ascending numbers below {count}.")
    if kept.heads is not None:
        kv_heads = torch.arange(structure.kv_heads or 0) if kept.kv_heads is None else kept.kv_heads.cpu()
        _check_equal("query heads on KV heads", kept.heads, structure.group, kv_heads)
    elif kept.kv_heads is not None:
        raise ValueError("KV heads leave with their query heads: name the query heads that stay, too.")
    if kept.experts is not None and structure.experts is not None:
        groups = torch.arange(structure.expert_groups)
        _check_equal("experts in groups", kept.experts, structure.experts // structure.expert_groups, groups)
    if kept.expert_channels is not None:
        rows = structure.experts if kept.experts is None else len(kept.experts)
        is_complete = kept.expert_channels.ndim == 2 and len(kept.expert_channels) == rows
        if not is_complete or not all(_is_ascending(row, structure.expert_width or 0) for row in kept.expert_channels):
            raise ValueError(f"Kept channels are not {rows} rows of ascending numbers below {structure.expert_width}.")


def _is_ascending(numbers: Tensor, count: int) -> bool:
    ascends = bool((numbers[1:] > numbers[:-1]).all())
    return ascends and len(numbers) > 0 and int(numbers[0]) >= 0 and int(numbers[-1]) < count


def _check_equal(kind: str, numbers: Tensor, size: int, owners: Tensor) -> None:
    """Refuse units that do not belong equally to all owners; each owner has `size` units in a row."""
    counts = Counter((numbers.cpu() // size).tolist())
    if counts.keys() != {*owners.tolist()} or len({*counts.values()}) != 1:
        raise ValueError(f"Kept {kind} are not equally many on each: {numbers.tolist()}.")


def _take(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """Return the entries of an axis; an index of two dimensions has a row for each entry of the first axis."""
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(axis, index)
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = index.shape
    expanded = list(tensor.shape)
    expanded[axis] = index.shape[1]
    return tensor.gather(axis, index.view(shape).expand(expanded))


def _rows(cut: Cut, tensor: Tensor, structure: Structure, kept: Kept) -> Tensor | None:
    """Return the numbers of the entries of a cut axis that stay; None for all of them."""
    if all(kept.units(unit) is None for unit in cut.runs):
        return None
    size = unit_size(cut, tensor.shape, structure)
    runs, start = list[Tensor](), 0
    for unit in cut.runs:
        count, units = structure.count(unit), kept.units(unit)
        assert count is not None
        units = torch.arange(count) if units is None else units.cpu()
        if cut.interleaved:
            runs.append(units * len(cut.runs) + len(runs))
        else:
            runs.append((start + units[..., None] * size + torch.arange(size)).flatten(-2))
        start += count * size
    return torch.stack(runs, -1).flatten(-2) if cut.interleaved else torch.cat(runs, -1)
