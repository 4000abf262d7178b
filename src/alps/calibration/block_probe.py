"""Probe of a model with a few tokens: which blocks and which layers its forward on text calls.

A layer without a call has no inputs. Its weight may be read by other code, as that of Mamba's `dt_proj`, or the whole
block waits for other inputs, as Mllama's cross-attention waits for images. No method prunes such a layer, whether it
reads inputs or not, so that the pruned layers do not depend on the settings.

The forward ends as soon as one block of every structure has run. Blocks of a model whose weights stay in files are read
for their call alone: mostly one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alps.calibration.dense_reference import input_hooks
from alps.calibration.replaced_forward import replaced_forwards
from alps.core.errors import AlpsError, UnsupportedModel, first_line
from alps.models.blocks import Block, memory_device, non_block_weights, on_device
from alps.models.sites import Site

_TOKENS = 8


class _AllSeen(Exception):
    """End of a forward in which one block of every structure has run."""


def probe_blocks(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks that a forward on text calls, renumbered, each with the sites that receive an input.

    Experts receive inputs if others of the same place do.

    Args:
        model: a causal language model; it is called with `input_ids` and `use_cache=False`.
        blocks: its decoder blocks.

    Raises:
        UnsupportedModel: when a forward fails, or calls no layer of the blocks.
    """
    probe = _Probe(blocks)
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        _evaluation_mode(model),
        non_block_weights(blocks),
        replaced_forwards(blocks, probe.make_forward),
        suppress(_AllSeen),
    ):
        device = memory_device(model)
        try:
            model(input_ids=ids.to(device), use_cache=False)
        except (AlpsError, _AllSeen, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may fail in any way
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be run on {_TOKENS} token ids alone: {first_line(error)}."
            ) from error
    called = [
        replace(block, index=index, sites=probe.called_sites(block))
        for index, block in enumerate(block for block in blocks if probe.is_called(block))
    ]
    if not any(block.sites for block in called):
        raise UnsupportedModel(f"A forward of {type(model).__name__} on text calls none of its linear layers.")
    return called


class _Probe:
    """Replacement of the forwards of all blocks, which records the calls of their sites by structure."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = {block.index: block for block in blocks}
        self._structures = {block.index: _structure(block) for block in blocks}
        # Places of the sites that were called, of every structure that has run.
        self._called: dict[Hashable, set[str]] = {}

    def is_called(self, block: Block) -> bool:
        """Check if a block of the same structure has run."""
        return self._structures[block.index] in self._called

    def called_sites(self, block: Block) -> list[Site]:
        """Return the sites that are called in blocks of this structure, and experts of the same place."""
        places = self._called[self._structures[block.index]]
        return [site for site in block.sites if _place(site, block) in places]

    def make_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the replacement for the forward of block `index`."""
        block = self._blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            called = self._called.setdefault(self._structures[index], set())
            with _loaded(block), input_hooks(block.sites, lambda site, _: called.add(_place(site, block))):
                output = original(*args, **kwargs)
            if self._called.keys() == set(self._structures.values()):
                raise _AllSeen
            return output

        return forward


def _structure(block: Block) -> Hashable:
    """Return what the calls in a block depend on: classes, sites, and settings of its modules except their number."""
    modules = [(name, type(module), _settings(module)) for name, module in block.module.named_modules()]
    return tuple(modules), tuple((site.name.removeprefix(block.name), site.shape) for site in block.sites)


def _settings(module: nn.Module) -> Hashable:
    values = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return tuple(item for item in sorted(values.items()) if not re.search(r"idx|index|layer_(id|num)", item[0]))


def _place(site: Site, block: Block) -> str:
    return site.place.removeprefix(block.name)


def _loaded(block: Block) -> AbstractContextManager[None]:
    return nullcontext() if block.store is None else on_device(block, torch.device("cpu"))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training: Iterable[nn.Module] = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
