"""Decoder blocks of a Hugging Face causal language model, and the parameters outside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.auto_class import is_composite, text_config
from alps.models.sites import Site, find_sites, is_fused, routing_parameters


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
        return Block(self.index, self.name, module, find_sites(self.name, module))


@dataclass(frozen=True)
class DenseParameter:
    """Matrix-like parameter that is not pruned: name, shape, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


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


def non_block_weights(blocks: Sequence[Block]) -> AbstractContextManager[None]:
    """Context in which the model's parameters outside the blocks are in memory."""
    return nullcontext() if blocks[0].store is None else blocks[0].store.non_block_weights()


def find_blocks(model: nn.Module) -> list[Block]:
    """Find the decoder blocks: the members of the longest `ModuleList` of modules of one class that hold sites.

    In a model with several parts only the text decoder is searched, since a vision tower may have more layers.

    Raises:
        UnsupportedModel: when there is no such list, or the model is an encoder-decoder.
    """
    configs = (getattr(model, "config", None), text_config(model))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models can be pruned."
        )
    decoder_prefix = _text_decoder_prefix(model)
    lists = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList)
        and name.startswith(decoder_prefix)
        and len({type(block) for block in child}) == 1
        and all(find_sites("", block) for block in child)
    ]
    if not lists:
        raise UnsupportedModel(
            f"No list of decoder blocks with linear layers was found in {type(model).__name__}: "
            "use a decoder-only model that transformers loads with AutoModelForCausalLM."
        )
    # A list inside a member of another list is part of a block: the experts of a layer, for example.
    outer = [(name, modules) for name, modules in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, modules = max(outer, key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters())))
    return [Block(i, f"{name}.{i}", module, find_sites(f"{name}.{i}", module)) for i, module in enumerate(modules)]


def _text_decoder_prefix(model: nn.Module) -> str:
    """Return the prefix of all names inside the text decoder; empty for a text-only model."""
    if not is_composite(model):
        return ""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name:
        raise UnsupportedModel(f"{type(model).__name__} does not say which of its parts is the text decoder.")
    return f"{name}."


def dense_parameters(model: nn.Module, pruned: set[str]) -> list[DenseParameter]:
    """List the parameters with two or more dimensions that are not pruned, with the reason.

    Norm weights and biases have one dimension and are never candidates.

    Args:
        model: a decoder-only model.
        pruned: names of pruned parameters, which are left out.
    """
    embeddings = {
        id(module.weight)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (module := getattr(model, name)()) is not None
    }
    embeddings |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    block_prefixes = tuple(f"{block.name}." for block in find_blocks(model))
    routing, rows = routing_parameters(model), []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in pruned:
            continue
        if id(parameter) in embeddings:
            reason = "embedding or output head"
        elif not name.startswith(block_prefixes):
            reason = "outside the decoder blocks"
        elif id(parameter) in routing:
            reason = "router of a mixture of experts"
        elif parameter.ndim > 2 and not is_fused(model.get_submodule(name.rpartition(".")[0]), parameter):
            reason = f"fused {parameter.ndim}-D weights are not supported"
        else:
            reason = "not a linear map that received calibration inputs"
        rows.append(DenseParameter(name, tuple(parameter.shape), reason))
    return rows
