"""Stand-in for the weight of a packed layer, for models whose code reads `layer.weight` and does not call the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """Tensor of which shape, dtype and device are known, and whose values are unpacked at the first operation.

    Operations are done on the unpacked tensor itself, so that changes in place are kept.

    Args:
        shape: of the weight.
        like: a tensor with its dtype and device.
        unpack: returns the unpacked tensor, the same in every call.
    """

    _unpack: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, unpack: Callable[[], Tensor]) -> Self:
        make: Any = Tensor._make_wrapper_subclass
        weight: Self = make(cls, shape, dtype=like.dtype, device=like.device)
        weight._unpack = unpack
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight._unpack(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def data_ptr(self) -> int:
        """Return the address of the unpacked tensor, which kernels in Triton ask for."""
        return self._unpack().data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
