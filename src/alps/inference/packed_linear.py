"""A linear layer that keeps its weight packed: what is not zero is read, the rest is never there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alps.checkpoints.bitmask_codec import PackedMatrix, check_packed
from alps.core.half_precision import multiplies_by_float32
from alps.inference.cpu_backend import KINDS, find_kernel
from alps.inference.torch_backend import unpack_rows
from alps.inference.triton_backend import find_gpu_kernel

# Rows that are unpacked at once for a dense product. On a CPU they are small enough to stay in the cache until then. A
# GPU needs many for its own product to be fast: most layers are unpacked whole.
_TILE_BYTES = 2**21
_GPU_TILE_BYTES = 2**28


class Multiplier(Protocol):
    """Interface of `cpu_backend.Kernel` and `triton_backend.GpuKernel`."""

    @property
    def bind(self) -> Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Any]:
        """Make sure that a packed matrix is one, and prepare it."""

    @property
    def few(self) -> Callable[[torch.dtype], int]:
        """Up to so many vectors are multiplied with the packed matrix as it is."""

    @property
    def linear(self) -> Callable[[Any, Tensor, Tensor, int], None]:
        """Multiply so many vectors into a tensor."""

    @property
    def unpack(self) -> Callable[[Any, int, Tensor], None]:
        """Write dense rows, from a first one on, into a tensor."""


@dataclass
class _Bound:
    """The kernel on the very tensors that a layer had when it was bound; None where torch has to do."""

    tensors: tuple[Tensor | None, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str
    kernel: Multiplier | None = None
    matrix: Any = None
    few: int = 0


class PackedLinear(nn.Module):
    """`y = x W^T + b` with W packed as in docs/format.md; for inference, W is not a parameter and cannot be trained.

    On a CPU the compiled kernel multiplies, where there is one, and on a GPU those in Triton; anywhere else, and where
    gradients with respect to the input are asked for, rows are unpacked by torch, some at a time, and multiplied
    densely: correct, and slower.

    Args:
        packed: the weight (out, in), of bfloat16, float16 or float32 for the kernel.
        bias: (out), or None.

    Attributes:
        mask, values, offsets: the packed weight, as buffers; they move and are cast with the module.
        in_features, out_features: as of `nn.Linear`.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, len(packed.mask)
        self.register_buffer("mask", packed.mask.contiguous())
        self.register_buffer("values", packed.values.contiguous())
        self.register_buffer("offsets", packed.offsets.contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._bound: _Bound | None = None

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of the values."""
        # Few calls and no attribute lookups through the module: small layers take ten microseconds in all.
        bound = self._binding()
        kernel, matrix = bound.kernel, bound.matrix
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            raise RuntimeError(f"the input is of shape {tuple(shape)}, the layer takes {self.in_features} features")
        if (
            kernel is None
            or input.dtype is not bound.dtype
            or (not input.is_cpu if bound.kind == "cpu" else input.device != bound.device)
            or torch.is_autocast_enabled(bound.kind)
            or (torch.is_grad_enabled() and (input.requires_grad or self._trains_bias()))
        ):
            return self._by_torch(input)
        x = input if input.is_contiguous() else input.contiguous()
        tokens = x.numel() // self.in_features
        out = x.new_empty((*shape[:-1], self.out_features))
        if tokens <= bound.few:
            kernel.linear(matrix, x, out, tokens)
        else:
            self._by_tiles(kernel, matrix, x.view(tokens, -1), out.view(tokens, self.out_features))
        return out

    def to_dense(self) -> Tensor:
        """The weight (out, in), on the layer's device: a copy, to the bit."""
        bound = self._binding()
        if bound.kernel is None:
            return torch.cat(list(self._tiles())) if self.out_features else self.values.new_empty(0, self.in_features)
        dense = self.values.new_empty(self.out_features, self.in_features)
        bound.kernel.unpack(bound.matrix, 0, dense)
        return dense

    def check(self) -> None:
        """Make sure that mask, values and offsets fit together, which products take for granted.

        Raises:
            ValueError: when they do not.
        """
        if self._binding().kernel is None:
            check_packed(PackedMatrix(self.mask, self.values, self.offsets, self.in_features))

    def extra_repr(self) -> str:
        """What is printed of the layer."""
        weights = self.in_features * self.out_features
        kept = f"{len(self.values) / weights:.2%} kept" if weights else "empty"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def _by_tiles(self, kernel: Multiplier, matrix: Any, x: Tensor, out: Tensor) -> None:
        """Many vectors: rows are unpacked into one buffer again and again, and multiplied as dense ones.

        On a GPU torch's allocator gives every layer the same memory for it, in the order of the stream and within CUDA
        graphs; a buffer of our own would have to be kept apart by streams, and would stay when nobody needs it.
        """
        count = self._tile_rows()
        tile = x.new_empty(min(count, self.out_features), self.in_features)
        if multiplies_by_float32(x.dtype, x.device):
            self._by_wide_tiles(kernel, matrix, x.float(), out, tile)
            return
        for first in range(0, self.out_features, count):
            rows = tile[: self.out_features - first]
            kernel.unpack(matrix, first, rows)
            part = out[:, first : first + len(rows)]
            if self.bias is None:
                torch.mm(x, rows.t(), out=part)
            else:
                torch.addmm(self.bias[first : first + len(rows)], x, rows.t(), out=part)

    def _by_wide_tiles(self, kernel: Multiplier, matrix: Any, x: Tensor, out: Tensor, tile: Tensor) -> None:
        """Multiply in float32 and round once, on processors without half-precision instructions."""
        wide, product = torch.empty_like(tile, dtype=torch.float32), x.new_empty(len(x), len(tile))
        for first in range(0, self.out_features, len(tile)):
            count = min(len(tile), self.out_features - first)
            kernel.unpack(matrix, first, tile[:count])
            rows, part = wide[:count].copy_(tile[:count]), product[:, :count]
            torch.mm(x, rows.t(), out=part)
            if self.bias is not None:
                part += self.bias[first : first + count]
            out[:, first : first + count] = part

    def _by_torch(self, input: Tensor) -> Tensor:
        if not self.out_features:
            return input.new_empty(*input.shape[:-1], 0)
        biases = itertools.repeat(None) if self.bias is None else torch.split(self.bias, self._tile_rows())
        parts = [F.linear(input, tile, bias) for tile, bias in zip(self._tiles(), biases, strict=False)]
        return torch.cat(parts, dim=-1)

    def _tiles(self) -> Iterator[Tensor]:
        count = self._tile_rows()
        for first in range(0, self.out_features, count):
            last = min(first + count, self.out_features)
            yield unpack_rows(self.mask, self.values, self.offsets, self.in_features, first, last)

    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def _tile_rows(self) -> int:
        most = _GPU_TILE_BYTES if self.values.is_cuda else _TILE_BYTES
        return max(most // (self.in_features * self.values.element_size()), 1)

    def _binding(self) -> _Bound:
        """The kernel on the tensors that are here now: they may have been moved, cast or replaced."""
        bound, buffers = self._bound, self._buffers
        if bound is not None:
            mask, values, offsets, bias = bound.tensors
            if (
                buffers["values"] is values
                and buffers["mask"] is mask
                and buffers["offsets"] is offsets
                and self._parameters["bias"] is bias
            ):
                return bound
        self._bound = self._bind()
        return self._bound

    def _bind(self) -> _Bound:
        mask, values, offsets, bias = tensors = (self.mask, self.values, self.offsets, self.bias)
        bound = _Bound(tensors, values.dtype, values.device, values.device.type)
        kernel: Multiplier | None = find_kernel() if values.is_cpu else find_gpu_kernel(values.device)
        if kernel is None or values.dtype not in KINDS or (bias is not None and bias.dtype != values.dtype):
            return bound
        bound.kernel, bound.few = kernel, kernel.few(values.dtype)
        bound.matrix = kernel.bind(mask, values, offsets, self.in_features, bias)
        return bound

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        # A parameter may get other memory and stay the same object.
        self._bound = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}
