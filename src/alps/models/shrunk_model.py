"""Smaller model on the meta device, and the check that transformers builds it as a part of its source."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block, find_blocks
from alps.models.meta_model import empty_model
from alps.models.shrink_config import shrunk_config
from alps.models.shrink_families import family_of
from alps.models.shrink_limits import check_numbers
from alps.models.shrink_slices import Kept, slice_block
from alps.models.structure import Structure, Target, read_structure

# Attributes of modules that say nothing of a block's kind: its number, and the mode that it is in.
_OTHER_NAMES = ("layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing")


def check_target(model: nn.Module, blocks: Sequence[Block], target: Target) -> Structure:
    """Refuse a target that a plain checkpoint of a model cannot have, and return the structure of the model.

    Raises:
        UnsupportedModel: for models that cannot lose these units.
        ConfigError: for numbers that cannot be.
    """
    structure = read_structure(model, blocks)
    check_numbers(model, structure, target)
    empty_shrunk_model(model, blocks, target)
    return structure


def empty_shrunk_model(model: nn.Module, blocks: Sequence[Block], target: Target) -> nn.Module:
    """Build a smaller model on the meta device, whose blocks take the sliced tensors of the kept blocks.

    Args:
        model: the source; its weights may be on the meta device.
        blocks: of the source.
        target: that `check_target` accepts.

    Returns:
        The model in the dtype of the source, with its generation settings.

    Raises:
        UnsupportedModel: when transformers builds other blocks than the kept ones, since their kind follows from their
            number.
        ConfigError: when transformers refuses the numbers.
    """
    structure = read_structure(model, blocks)
    kept = target.complete(structure).kept_blocks or ()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    sources = [blocks[number] for number in kept]
    if len(kept) < structure.blocks:
        shorter = empty_model(shrunk_config(model, structure, Target(kept_blocks=kept)), dtype)
        _check_kinds(sources, find_blocks(shorter))
    shrunk = empty_model(shrunk_config(model, structure, target), dtype)
    _check_shapes(model, structure, target, sources, find_blocks(shrunk))
    settings: Any = getattr(model, "generation_config", None)
    shrunk.generation_config = copy.deepcopy(settings)
    return shrunk.eval()


def _check_kinds(sources: Sequence[Block], blocks: Sequence[Block]) -> None:
    for source, block in zip(sources, blocks, strict=True):
        if dict(_kinds(source.module)) != dict(_kinds(block.module)):
            raise UnsupportedModel(
                f"{source.name} would be of another kind as block {block.index} of the smaller model: choose other "
                "blocks, so that the kinds of the others stay in order."
            )


def _kinds(block: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the class and all numbers and words of each module of a block."""
    for name, module in block.named_modules():
        yield name, type(module)
        for attribute, value in vars(module).items():
            if attribute not in _OTHER_NAMES and isinstance(value, bool | int | float | str | None):
                yield f"{name}.{attribute}", value


def _check_shapes(
    model: nn.Module, structure: Structure, target: Target, sources: Sequence[Block], blocks: Sequence[Block]
) -> None:
    kept = _any_units(structure, target)
    for source, block in zip(sources, blocks, strict=True):
        state = {name: tensor.to("meta") for name, tensor in source.module.state_dict().items()}
        expected = {n: t.shape for n, t in slice_block(state, family_of(model), structure, kept).items()}
        shapes = {name: tensor.shape for name, tensor in block.module.state_dict().items()}
        if shapes != expected:
            name = next(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name))
            raise UnsupportedModel(
                f"transformers builds {block.name}.{name} as {_shape(shapes.get(name))} and not as "
                f"{_shape(expected.get(name))}: models of type '{_type(model)}' cannot lose these units."
            )


def _any_units(structure: Structure, target: Target) -> Kept:
    """Return as many units as stay; which ones they are has no effect on shapes."""
    complete = target.complete(structure)
    counts = {
        "channels": (complete.mlp_width, structure.mlp_width),
        "kv_heads": (complete.kv_heads, structure.kv_heads),
        "shared_channels": (complete.shared_width(structure), structure.shared_width),
    }
    kept = Kept(**{name: torch.arange(count) for name, (count, before) in counts.items() if count and count != before})
    if (complete.heads, complete.kv_heads) != (structure.heads, structure.kv_heads):
        kv_heads = complete.kv_heads or 1
        kept = replace(kept, heads=_leading(kv_heads, structure.group, (complete.heads or 0) // kv_heads))
    if complete.experts is not None and structure.experts is not None and complete.experts != structure.experts:
        groups = structure.expert_groups
        kept = replace(kept, experts=_leading(groups, structure.experts // groups, complete.experts // groups))
    if complete.expert_width is None or complete.expert_width == structure.expert_width:
        return kept
    return replace(kept, expert_channels=torch.arange(complete.expert_width).repeat(complete.experts or 0, 1))


def _leading(groups: int, size: int, count: int) -> Tensor:
    """Return the numbers of the first units of each group."""
    return (torch.arange(groups)[:, None] * size + torch.arange(count)).flatten()


def _shape(shape: Any) -> str:
    return "nothing" if shape is None else str(list(shape))


def _type(model: nn.Module) -> str:
    return str(model.config.model_type)  # type: ignore[union-attr]
