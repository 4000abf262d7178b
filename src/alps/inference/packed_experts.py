"""Fused experts with packed weights: a stand-in for a parameter (experts, out, in) or (experts, in, out).

Code of transformers takes the matrix of one expert after the other from such a parameter, and multiplies with it. Each
is a packed layer, whose kernel multiplies. Code that computes with the whole parameter gets it dense, for that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from alps.checkpoints.bitmask_codec import pack
from alps.inference.lazy_weight import LazyWeight
from alps.inference.packed_linear import PackedLinear
from alps.models.sites import stores_inputs_first

_PRODUCTS = frozenset({"matmul", "mm", "__matmul__"})


class ExpertWeight(LazyWeight):
    """Weight of one expert: products with it are those of its packed layer, and other operations unpack it."""

    _layer: PackedLinear

    @staticmethod
    def of(layer: PackedLinear) -> ExpertWeight:
        """Return the weight of a packed layer, in the orientation in which the model's code expects it."""
        shape = (layer.out_features, layer.in_features)
        weight = ExpertWeight(shape[::-1] if layer.inputs_first else shape, layer.values, lambda: _dense(layer))
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) > 1 and isinstance(weight := args[1], ExpertWeight) and not isinstance(args[0], ExpertWeight):
            layer = weight._layer
            if func is F.linear and not layer.inputs_first:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return layer(args[0]) if bias is None else layer(args[0]) + bias
            if getattr(func, "__name__", "") in _PRODUCTS and layer.inputs_first:
                return layer(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class PackedExperts(nn.Module):
    """Stand-in for the fused parameter of all experts, under its name in the module that owns it.

    Args:
        layers: one packed layer per expert, all of one shape and orientation.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self.layers)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the weight of an expert; of several experts, or by other indices, a dense tensor."""
        if isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim and index.dtype != torch.bool):
            return ExpertWeight.of(self._layer(int(index)))
        if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
            numbers, places = torch.unique(index, return_inverse=True)
            return torch.stack([_dense(self._layer(number)) for number in numbers.tolist()])[places]
        return self.to_dense()[index]

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor has under a name, such as its shape or a method; methods unpack the experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        first = self._layer(0)
        shape = (first.out_features, first.in_features)
        return getattr(
            LazyWeight((len(self), *(shape[::-1] if first.inputs_first else shape)), first.values, self.to_dense), name
        )

    def to_dense(self) -> Tensor:
        """Return the dense parameter."""
        return torch.stack([_dense(self._layer(number)) for number in range(len(self))])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch on the dense parameter; products of batches run expert by expert."""
        if func is torch.bmm and isinstance(args[1], PackedExperts) and args[1]._layer(0).inputs_first:
            return torch.stack([layer(x) for layer, x in zip(args[1].layers, args[0], strict=True)])
        args, kwargs = tree_map_only(PackedExperts, lambda experts: experts.to_dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def _layer(self, number: int) -> PackedLinear:
        return cast(PackedLinear, self.layers[number])


def replace_experts(owner: nn.Module, attribute: str, matrices: Iterable[Tensor]) -> None:
    """Replace the fused parameter of all experts by packed matrices.

    Args:
        owner: module with the parameter.
        attribute: name of the parameter.
        matrices: slices of the parameter, by expert; one is in memory at a time.
    """
    inputs_first = stores_inputs_first(owner)
    layers = [
        PackedLinear(pack(matrix.t().contiguous() if inputs_first else matrix), inputs_first=inputs_first)
        for matrix in matrices
    ]
    del owner._parameters[attribute]
    owner.add_module(attribute, PackedExperts(layers))


def run_experts_singly(model: nn.Module) -> None:
    """Let a model take one expert after the other, and not all at once, if it can choose and holds packed experts."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None and any(isinstance(module, PackedExperts) for module in model.modules()):
        choose("eager")


def _dense(layer: PackedLinear) -> Tensor:
    """Return the dense weight of a layer in the orientation in which the model's code expects it."""
    dense = layer.to_dense()
    return dense.t() if layer.inputs_first else dense
