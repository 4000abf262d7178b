"""Decoder blocks of a Hugging Face causal language model, and the parameters outside them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.auto_class import is_composite, text_config
from alps.models.linear_maps import ProductCheck
from alps.models.routers import is_inside
from alps.models.sites import Site, find_sites


class WeightStore(Protocol):
    """Source of the dense weights of a model that is not held in memory."""

    def fetch(self, block: Block, device: torch.device) -> None:
        """Load the dense parameters of a block to a device."""

    def release(self, block: Block) -> None:
        """Free the parameters of a block; changes to them are lost."""

    def non_block_weights(self) -> AbstractContextManager[None]:
        """Context in which the parameters outside the blocks are in memory."""


@dataclass(frozen=True)
class Block:
    """Decoder layer.

    Attributes:
        index: position among the blocks, from 0.
        name: dotted name inside the model.
        module: the layer itself.
        sites: its prunable layers. The list is shared with copies that `dataclasses.replace` makes; it must not be
            changed.
        store: source of its weights each time they are needed; None when the module holds them.
        frozen: names, inside the block, of parameters that must not change.
    """

    index: int
    name: str
    module: nn.Module
    sites: list[Site]
    store: WeightStore | None = None
    frozen: frozenset[str] = frozenset()

    def with_sites(self, sites: list[Site]) -> Block:
        """Return the same block, with the same module, restricted to some of its sites."""
        return replace(self, sites=sites)

    def clone(self) -> Block:
        """Return a copy with weights of its own, equal to the present ones; it has no store."""
        module = copy.deepcopy(self.module)
        inside = {
            id(original): copied for original, copied in zip(self.module.modules(), module.modules(), strict=True)
        }
        sites = [replace(site, module=inside[id(site.module)]) for site in self.sites]
        return Block(self.index, self.name, module, sites)


@contextmanager
def on_device(block: Block, device: torch.device) -> Iterator[None]:
    """Context in which a block is on a device.

    A block with a store begins with its dense weights, and they are freed at the end. Other blocks return to the device
    that they came from, with their changes.
    """
    if block.store is not None:
        try:
            block.store.fetch(block, device)
            yield
        finally:
            block.store.release(block)
        return
    original_device = next(block.module.parameters()).device
    block.module.to(device)
    try:
        yield
    finally:
        block.module.to(original_device)


def memory_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter that is in memory; blocks with a store are on the meta device."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def non_block_weights(blocks: Sequence[Block]) -> AbstractContextManager[None]:
    """Context in which the model's parameters outside the blocks are in memory."""
    return nullcontext() if blocks[0].store is None else blocks[0].store.non_block_weights()


def find_blocks(model: nn.Module) -> list[Block]:
    """Find the decoder blocks: the members of the longest `ModuleList` whose members hold linear layers.

    They may be of several classes, such as attention and state-space layers. In a model with several parts only the
    text decoder is searched, since a vision tower may have more layers. Layers whose weight has several owners are no
    sites: pruned for the inputs of one of them, it would be wrong for the others.

    Raises:
        UnsupportedModel: when there is no such list, or the model is an encoder-decoder.
    """
    configs = (getattr(model, "config", None), text_config(model))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models can be pruned."
        )
    decoder_prefix = _text_decoder_prefix(model)
    is_product, shared = ProductCheck(), shared_parameters(model)
    lists: dict[str, list[Block]] = {}
    for name, modules in model.named_modules():
        # A list inside a member of another list is part of a block: the experts of a layer, for example.
        if isinstance(modules, nn.ModuleList) and name.startswith(decoder_prefix) and not is_inside(name, list(lists)):
            blocks = [_block(f"{name}.{i}", i, module, is_product, shared) for i, module in enumerate(modules)]
            if any(block.sites for block in blocks):
                lists[name] = blocks
    if not lists:
        raise UnsupportedModel(
            f"No list of decoder blocks with linear layers was found in {type(model).__name__}: "
            "use a decoder-only model that transformers loads with AutoModelForCausalLM."
        )
    return max(lists.values(), key=_extent)


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that have several names in a model: tied weights, and those of shared modules."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def _block(name: str, index: int, module: nn.Module, is_product: ProductCheck, shared: set[int]) -> Block:
    sites = [site for site in find_sites(name, module, is_product) if id(site.parameter) not in shared]
    return Block(index, name, module, sites)


def _extent(blocks: Sequence[Block]) -> tuple[int, int]:
    """Return the number of blocks with sites, and that of their parameters."""
    parameters = {id(p): p.numel() for block in blocks for p in block.module.parameters()}
    return sum(bool(block.sites) for block in blocks), sum(parameters.values())


def _text_decoder_prefix(model: nn.Module) -> str:
    """Return the prefix of all names inside the text decoder; empty for a text-only model."""
    if not is_composite(model):
        return ""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name:
        raise UnsupportedModel(f"{type(model).__name__} does not say which of its parts is the text decoder.")
    return f"{name}."
