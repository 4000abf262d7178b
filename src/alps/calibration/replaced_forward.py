"""Replacement of the forwards of single modules; their classes stay unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from alps.models.blocks import Block


@contextmanager
def replaced_forwards(
    blocks: Sequence[Block], make_forward: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Context in which the instance of every block has another `forward`; the class stays unchanged.

    Args:
        blocks: whose forwards to replace.
        make_forward: makes the replacement of a block's index and its forward.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.module, make_forward(block.index, block.module.forward)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which the instance of a module has another `forward`; the class stays unchanged."""
    # Other code, such as accelerate's hooks, may have set a forward on the instance, which is restored.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
