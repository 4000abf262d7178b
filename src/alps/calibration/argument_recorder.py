"""Recorder of the arguments of all blocks in one forward of the model, which stores equal tensors once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alps.calibration.block_arguments import (
    BlockArguments,
    Container,
    ContainerKey,
    HandedOn,
    children,
    is_container,
    rebuild,
)


class UnsupportedArgument(Exception):
    """Argument that cannot be replayed: its name, and the reason as the end of a sentence."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class ArgumentRecorder:
    """Recorder of one forward.

    Trees that equal those of an earlier forward are not stored: the earlier objects are returned.
    """

    def __init__(
        self,
        windows: int,
        references: Sequence[Sequence[BlockArguments]] = (),
        store: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """Start before the first block.

        Args:
            windows: number of windows in this forward.
            references: arguments of all blocks in earlier forwards: in one of a single window, then in one of as many
                windows as now. Empty for the first forward, of a single window.
            store: returns a tensor with the same values for long storage.
        """
        self._windows, self._references, self._store = windows, references, store
        # The values are kept, so that their identities stay unique.
        self._handed_on: dict[int, tuple[Any, HandedOn]] = {}
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._containers: dict[int, tuple[Any, Container]] = {}

    def hand_on(self, block: int, outputs: Sequence[Tensor]) -> None:
        """Announce the outputs that a block returns: an argument that is one of these objects is handed on."""
        for position, output in enumerate(outputs):
            self._handed_on[id(output)] = output, HandedOn(block, position)

    def record(self, block: int, names: Sequence[str], arguments: BlockArguments) -> BlockArguments:
        """Record the arguments of a block.

        Args:
            block: its index.
            names: of the positional arguments.
            arguments: as the model gives them, without the hidden states.

        Returns:
            Trees to store.

        Raises:
            UnsupportedArgument: when an argument depends on the tokens in a way that cannot be replayed.
        """
        earlier = [forward[block] for forward in self._references]
        values = [*zip(names, arguments.args, strict=True), *arguments.kwargs.items()]
        columns = [_named(reference, names) for reference in earlier]
        if any(column.keys() != dict(values).keys() for column in columns):
            raise UnsupportedArgument("", "the number of its arguments depends on the tokens")
        recorded = {
            name: self._record(value, [column[name] for column in columns], block, name) for name, value in values
        }
        for reference, column in zip(earlier, columns, strict=True):
            if all(recorded[name] is column[name] for name in recorded):
                return reference
        return BlockArguments(
            tuple(recorded[name] for name in names), {name: recorded[name] for name in arguments.kwargs}
        )

    def _record(self, value: Any, earlier: list[Any], block: int, path: str) -> Any:
        """Return the tree to store for a value; `earlier` holds the trees of earlier forwards in this place."""
        if torch.is_tensor(value):
            return self._record_tensor(value, earlier, path)
        if is_container(value):
            if id(value) not in self._containers:
                self._containers[id(value)] = value, self._record_container(value, earlier, block, path)
            return self._containers[id(value)][1]
        if isinstance(value, tuple):
            return self._record_items(value, earlier, block, path)
        if any(torch.is_tensor(tree) or isinstance(tree, tuple | Container | HandedOn) for tree in earlier):
            raise UnsupportedArgument(path, "it is a tensor for some windows only")
        return next((tree for tree in earlier if _is_same(value, tree)), value)

    def _record_container(self, value: Any, earlier: list[Any], block: int, path: str) -> Container:
        if any(not isinstance(tree, Container) for tree in earlier):
            raise UnsupportedArgument(path, "it is a list or a dict for some windows only")
        items = self._record_items(value, [tree.initial for tree in earlier], block, path)
        key = ContainerKey(block, path)
        return next((tree for tree in earlier if tree.key == key and tree.initial is items), Container(key, items))

    def _record_items(self, value: Any, earlier: list[Any], block: int, path: str) -> Any:
        keys = [key for key, _ in children(value)]
        if any([key for key, _ in children(tree)] != keys for tree in earlier):
            raise UnsupportedArgument(path, "its items depend on the tokens")
        columns = [[item for _, item in children(tree)] for tree in earlier]
        items = [
            self._record(item, [column[i] for column in columns], block, f"{path}[{key!r}]")
            for i, (key, item) in enumerate(children(value))
        ]
        for tree, column in zip(earlier, columns, strict=True):
            if all(a is b for a, b in zip(items, column, strict=True)):
                return tree
        return rebuild(value, items)

    def _record_tensor(self, value: Tensor, earlier: list[Any], path: str) -> Any:
        if id(value) in self._handed_on:
            key = self._handed_on[id(value)][1]
            if any(torch.is_tensor(tree) or tree != key for tree in earlier):
                raise UnsupportedArgument(path, "it comes from other blocks for other windows")
            return next(iter(earlier), key)
        if any(not torch.is_tensor(tree) for tree in earlier):
            raise UnsupportedArgument(path, "it is a tensor for some windows only")
        if id(value) not in self._stored:
            stored = next((tree for tree in earlier if _is_equal(value, tree)), None)
            if stored is None:
                if earlier:
                    self._check_windows(value, earlier[0], path)
                stored = self._store(value.detach())
            self._stored[id(value)] = value, stored
        return self._stored[id(value)][1]

    def _check_windows(self, value: Tensor, single: Tensor, path: str) -> None:
        """Check that a tensor holds the windows along one axis.

        Raises:
            UnsupportedArgument: when it does not.
        """
        if self._windows == 1 and value.shape == single.shape:
            return
        axes = [i for i, (size, other) in enumerate(zip(value.shape, single.shape, strict=False)) if size != other]
        if value.ndim != single.ndim or len(axes) != 1 or value.shape[axes[0]] != self._windows * single.shape[axes[0]]:
            raise UnsupportedArgument(path, "it depends on the tokens of several windows at once")


def _named(arguments: BlockArguments, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, arguments.args, strict=False)), **arguments.kwargs}


def _is_equal(value: Tensor, other: Tensor) -> bool:
    return value is other or (value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other))


def _is_same(value: Any, other: Any) -> bool:
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device)
    return value is other or (isinstance(value, plain) and type(value) is type(other) and value == other)
