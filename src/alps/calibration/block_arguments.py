"""Arguments of blocks except their hidden states, as trees of tuples, lists and dicts with tensors and other values.

Two kinds of values are not stored with the arguments, because they depend on earlier blocks: outputs of earlier blocks
(`HandedOn`), and containers that blocks fill for later ones (`Container`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HandedOn:
    """Output of an earlier block in an argument; output 0 are the hidden states."""

    block: int
    output: int


@dataclass(frozen=True)
class ContainerKey:
    """First block that receives a container, and where it stands in the arguments."""

    block: int
    path: str


@dataclass(frozen=True, eq=False)
class Container:
    """List or dict in an argument, in the state before the first block.

    Attributes:
        key: the same for all blocks that receive this container.
        initial: its items, as a tree.
    """

    key: ContainerKey
    initial: Any


# Values that blocks hand to later blocks, of one batch.
HandedValues = dict[HandedOn | ContainerKey, Any]


class BlockArguments(NamedTuple):
    """Arguments of one block for one batch, except its hidden states: trees with `HandedOn` and `Container` leaves."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def is_container(value: Any) -> bool:
    """Return True for lists and dicts, also for classes that behave like a dict."""
    return isinstance(value, list | dict | MutableMapping)


def children(value: Any) -> list[tuple[Any, Any]]:
    """List the keys and the items of a tuple, a list or a dict; empty for any other value."""
    if isinstance(value, Container):
        return children(value.initial)
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    return list(value.items()) if is_container(value) else []


def rebuild(value: Any, items: list[Any]) -> Any:
    """Return a tuple, list or dict like `value` with other items, in the order of `children`."""
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return type(value)(items)
    changed = copy.copy(value)
    for key, item in zip(value.keys(), items, strict=True):
        changed[key] = item
    return changed


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tree with every leaf changed; lists and dicts are new objects."""
    if isinstance(value, tuple | list) or is_container(value):
        return rebuild(value, [map_leaves(item, change) for _, item in children(value)])
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of a tree, and the containers in it before their items."""
    if isinstance(value, Container) or not (isinstance(value, tuple) or is_container(value)):
        yield value
    for _, item in children(value):
        yield from leaves(item)


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a tree to a device."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Container):
            return Container(leaf.key, to_device(leaf.initial, device))
        return leaf.to(device) if torch.is_tensor(leaf) else leaf

    return map_leaves(value, move)


def to_meta(value: Any) -> Any:
    """Return a tree with the shapes of the tensors only."""
    return to_device(value, torch.device("meta"))


def select_window(value: Any, single: Any, window: int) -> Any:
    """Return the part of a batch's tree that belongs to one window.

    Args:
        value: of the batch.
        single: the same tree of a single window; of its tensors only the shapes are read, its other leaves are taken.
        window: number of the window in the batch.
    """
    if torch.is_tensor(value):
        axis = window_axis(value, single)
        return value if axis is None else value.narrow(axis, window * single.shape[axis], single.shape[axis])
    if isinstance(value, Container):
        return Container(value.key, select_window(value.initial, single.initial, window))
    items = children(value)
    if not items:
        return single
    pairs = zip(items, children(single), strict=True)
    return rebuild(value, [select_window(item, single_item, window) for (_, item), (_, single_item) in pairs])


def window_axis(value: Tensor, single: Tensor) -> int | None:
    """Return the axis along which a batch's tensor holds its windows, None if it has as many values for one window."""
    axes = [i for i, (size, other) in enumerate(zip(value.shape, single.shape, strict=True)) if size != other]
    assert len(axes) <= 1, "a batch's tensor differs from that of a window in several sizes"
    return axes[0] if axes else None


@dataclass
class Call:
    """Arguments of one call of a block, with tensors on its device.

    Attributes:
        args, kwargs: without the hidden states.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    # Containers that the block may fill, each with its leaves before the call.
    containers: dict[ContainerKey, tuple[Any, list[Any]]] = field(default_factory=dict)

    def changed_containers(self) -> dict[ContainerKey, Any]:
        """Return the containers that the block has changed."""

        def is_changed(container: Any, before: list[Any]) -> bool:
            after = list(leaves(container))
            return len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True))

        return {key: value for key, (value, before) in self.containers.items() if is_changed(value, before)}


def make_call(arguments: BlockArguments, handed_on: HandedValues, device: torch.device) -> Call:
    """Put the values of earlier blocks into arguments, and move all tensors to a device.

    Args:
        arguments: of a block for a batch or a window.
        handed_on: by the earlier blocks, for the same windows.
        device: of the tensors.
    """
    call = Call()

    def resolve(value: Any) -> Any:
        if isinstance(value, Container):
            if value.key not in call.containers:
                # The block gets its own copy: it may run any number of times.
                container = to_device(handed_on.get(value.key, value.initial), device)
                call.containers[value.key] = container, list(leaves(container))
            return call.containers[value.key][0]
        if isinstance(value, HandedOn):
            return to_device(handed_on[value], device)
        return to_device(value, device) if torch.is_tensor(value) else value

    call.args, call.kwargs = map_leaves(arguments, resolve)
    return call
