"""Find the decoder blocks of any Hugging Face causal language model, and say what lies outside them."""

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


class Store(Protocol):
    """Where the dense weights of a model lie that is not held in memory."""

    def fetch(self, block: Block, device: torch.device) -> None:
        """Give the parameters of a block their dense values, on `device`."""

    def release(self, block: Block) -> None:
        """Let go of the parameters of a block, and of what became of them."""

    def outside(self) -> AbstractContextManager[None]:
        """Have everything outside the blocks in memory for the time of the body."""


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        index, name, module, sites: its place among the blocks, its dotted name, itself, and what can be pruned in it.
        store: where its weights come from each time they are needed; None where the module holds them.
        fixed: parameters that nothing may change, by their names inside the block.
    """

    index: int
    name: str
    module: nn.Module
    sites: list[Site]
    store: Store | None = None
    fixed: frozenset[str] = frozenset()

    def only(self, sites: list[Site]) -> Block:
        """The same block with some of its sites."""
        return replace(self, sites=sites)

    def twin(self) -> Block:
        """A copy that holds the weights which the block has now."""
        module = copy.deepcopy(self.module)
        return Block(self.index, self.name, module, find_sites(self.name, module))


@dataclass(frozen=True)
class DenseParameter:
    """A matrix-like parameter that is not pruned: name, shape, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@contextmanager
def on_device(block: Block, device: torch.device) -> Iterator[None]:
    """Bring a block to the device for the time of the body; one with a store begins dense, and keeps nothing."""
    if block.store is not None:
        try:
            block.store.fetch(block, device)
            yield
        finally:
            block.store.release(block)
        return
    home = next(block.module.parameters()).device
    block.module.to(device)
    try:
        yield
    finally:
        block.module.to(home)


def outside(blocks: Sequence[Block]) -> AbstractContextManager[None]:
    """Have everything outside the blocks in memory for the time of the body."""
    return nullcontext() if blocks[0].store is None else blocks[0].store.outside()


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks: the members of the longest `ModuleList` of modules of one class that hold sites.

    Of a model that is more than its text part only the text decoder is looked at: a vision tower may have more layers.

    Raises:
        UnsupportedModel: when there is no such list, or the model is an encoder-decoder.
    """
    configs = (getattr(model, "config", None), text_config(model))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models can be pruned."
        )
    inside = _text_decoder(model)
    lists = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList)
        and name.startswith(inside)
        and len({type(block) for block in child}) == 1
        and all(find_sites("", block) for block in child)
    ]
    if not lists:
        raise UnsupportedModel(
            f"No list of decoder blocks with linear layers was found in {type(model).__name__}: "
            "use a decoder-only model that transformers loads with AutoModelForCausalLM."
        )
    # A list inside a member of another list (the experts of a layer, say) is a part of a block.
    outer = [(name, found) for name, found in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, blocks = max(outer, key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters())))
    return [Block(i, f"{name}.{i}", block, find_sites(f"{name}.{i}", block)) for i, block in enumerate(blocks)]


def _text_decoder(model: nn.Module) -> str:
    """What the names of everything inside the text decoder begin with; empty for a model that is nothing else."""
    if not is_composite(model):
        return ""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name:
        raise UnsupportedModel(f"{type(model).__name__} does not say which of its parts is the text decoder.")
    return f"{name}."


def dense_parameters(model: nn.Module, pruned: set[str]) -> list[DenseParameter]:
    """Every parameter with two or more dimensions that is not in `pruned` (parameter names), with the reason.

    Norm weights and biases have one dimension and are never candidates.
    """
    embeddings = {
        id(module.weight)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (module := getattr(model, name)()) is not None
    }
    embeddings |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    routing, rows = routing_parameters(model), []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in pruned:
            continue
        if id(parameter) in embeddings:
            reason = "embedding or output head"
        elif not name.startswith(inside):
            reason = "outside the decoder blocks"
        elif id(parameter) in routing:
            reason = "router of a mixture of experts"
        elif parameter.ndim > 2 and not is_fused(model.get_submodule(name.rpartition(".")[0]), parameter):
            reason = f"fused {parameter.ndim}-D weights are not supported"
        else:
            reason = "not a linear map that received calibration inputs"
        rows.append(DenseParameter(name, tuple(parameter.shape), reason))
    return rows
