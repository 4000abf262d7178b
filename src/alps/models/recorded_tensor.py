"""Tensors of a checkpoint that are not read yet: operations on them are recorded, and computed when they are needed.

transformers loads checkpoints whose tensors have other names, shapes or numbers than those of its models: it renames,
stacks, concatenates, splits and transposes them. Given recorded tensors, its loader leaves in every parameter a record
of what the parameter is made of. No table of names is needed, and the result is that of the loader, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_META = torch.device("meta")
# Operations that return their first argument, or its values in another dtype or memory.
_COPIES = frozenset({"alias", "detach", "clone", "_to_copy", "lift_fresh"})
# Operations whose results do not depend on the values of their arguments.
_NEW = frozenset({f"{kind}_like" for kind in ("empty", "ones", "rand", "randn", "zeros", "full")})


@dataclass(frozen=True, eq=False)
class _Source:
    """Tensor of a checkpoint."""

    name: str
    read: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True, eq=False)
class _Step:
    """Output number `index` of an operation; None for the only one."""

    operation: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    index: int | None


class RecordedTensor(Tensor):
    """Tensor with a shape and a dtype, and a record of the operations that give its values.

    Operations that return other values than tensors, such as a comparison, are computed at once. So are changes in
    place, which the tensor keeps.
    """

    _record: _Source | _Step
    _changed: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, record: _Source | _Step) -> RecordedTensor:
        """Create a tensor with the shape, strides and dtype of `like`, on the CPU."""
        make: Any = Tensor._make_wrapper_subclass
        tensor: RecordedTensor = make(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        tensor._record, tensor._changed = record, None
        return tensor

    @classmethod
    def stored(cls, name: str, shape: list[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> RecordedTensor:
        """Return a tensor of a checkpoint.

        Args:
            name: in the checkpoint.
            shape: in the checkpoint.
            dtype: in the checkpoint.
            read: returns its values; called each time they are needed.
        """
        return cls(torch.empty(shape, dtype=dtype, device=_META), _Source(name, read))

    @property
    def source(self) -> str | None:
        """Name of the stored tensor of which this is a copy, in whatever dtype; None if it was computed."""
        tensor = self
        while isinstance(record := tensor._record, _Step):
            if tensor._changed is not None or _name(record.operation) not in _COPIES:
                return None
            tensor = record.arguments[0]
        return record.name if tensor._changed is None else None

    @property
    def sources(self) -> list[str]:
        """Names of all stored tensors that the values are made of, each once."""
        names = dict[str, None]()
        pending: list[RecordedTensor] = [self]
        while pending:
            record = pending.pop()._record
            if isinstance(record, _Source):
                names[record.name] = None
            else:
                flat, _ = tree_flatten((record.arguments, record.options))
                pending += [item for item in reversed(flat) if isinstance(item, RecordedTensor)]
        return list(names)

    def compute(self) -> Tensor:
        """Read the stored tensors and return the values."""
        record = self._record
        if self._changed is not None:
            return self._changed
        return record.read() if isinstance(record, _Source) else _run(record, *_computed(record.arguments))

    def part(self, number: int) -> Tensor:
        """Return a record of slice `number` along the first dimension, made of as few stored tensors as it can be."""
        record = self._record
        if isinstance(record, _Source) or record.index is not None or self._changed is not None:
            return self[number]
        name, (first, *others) = _name(record.operation), record.arguments
        # Dimensions may be given by position or by name, may count from the end, and are 0 if they are left out.
        dimensions = [int(dim) % self.ndim for dim in (*others, *record.options.values()) if isinstance(dim, int)]
        if name in _COPIES:
            return record.operation(first.part(number), *others, **record.options)  # type: ignore[no-any-return]
        if name == "stack" and not any(dimensions):
            return cast(Tensor, first[number])
        if name == "cat" and all(dimensions) and dimensions:
            return torch.cat([tensor.part(number) for tensor in first], dimensions[0] - 1)
        if name == "transpose" and all(dimensions):
            return cast(Tensor, first.part(number)).transpose(dimensions[0] - 1, dimensions[1] - 1)
        return self[number]

    def _to_change(self) -> Tensor:
        """Return the values, in memory that later computations read."""
        record = self._record
        if isinstance(record, _Step) and record.operation.is_view:
            return _run(record, record.arguments[0]._to_change(), *_computed(record.arguments[1:]))
        self._changed = self.compute()
        return self._changed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func._schema.is_mutable and isinstance(args[0], RecordedTensor):
            func(args[0]._to_change(), *_computed(args[1:]), **_computed(kwargs))
            return args[0]
        if _name(func) in _NEW:
            return func(_on_cpu(args[0]), *args[1:], **kwargs)
        if func._schema.is_mutable or not any(map(_is_tensor, func._schema.returns)):
            return func(*_computed(args), **_computed(kwargs))
        flat, spec = tree_flatten((args, kwargs))
        shapes = [_on_meta(item) if isinstance(item, Tensor) else item for item in flat]
        meta_args, meta_kwargs = tree_unflatten(shapes, spec)
        if "device" in meta_kwargs:
            meta_kwargs["device"], kwargs["device"] = _META, torch.device("cpu")
        result = func(*meta_args, **meta_kwargs)
        if isinstance(result, Tensor):
            return cls(result, _Step(func, args, kwargs, None))
        return type(result)(cls(part, _Step(func, args, kwargs, i)) for i, part in enumerate(result))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RecordedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, sources={self.sources[:3]})"


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor of a single value, repeated in the shape and with the dtype of another."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _run(step: _Step, *arguments: Any) -> Tensor:
    result: Any = step.operation(*arguments, **_computed(step.options))
    output: Tensor = result if step.index is None else result[step.index]
    return output


def _computed(arguments: Any) -> Any:
    """Return arguments of an operation with the values of recorded tensors."""
    return tree_map(lambda item: item.compute() if isinstance(item, RecordedTensor) else item, arguments)


def _is_tensor(returned: Any) -> bool:
    return "Tensor" in str(returned.type)


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")
