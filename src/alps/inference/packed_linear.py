"""Linear layer with a packed weight: only the nonzero weights are in memory and are read."""

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
from alps.inference.lazy_weight import LazyWeight
from alps.inference.torch_backend import unpack_rows
from alps.inference.triton_backend import find_gpu_kernel

# Bytes of the rows that are unpacked at a time for a dense product. On a CPU they fit into the cache. A GPU needs many
# rows for its product to be fast, so that most layers are unpacked whole.
_TILE_BYTES = 2**21
_GPU_TILE_BYTES = 2**28


class Multiplier(Protocol):
    """Interface of `cpu_backend.Kernel` and `triton_backend.GpuKernel`."""

    @property
    def bind(self) -> Callable[[PackedMatrix, Tensor | None], Any]:
        """Check and prepare a packed matrix with its bias."""

    @property
    def max_packed_batch(self) -> Callable[[torch.dtype], int]:
        """Return the largest number of vectors that are multiplied faster packed than after unpacking the matrix."""

    @property
    def linear(self) -> Callable[[Any, Tensor, Tensor, int], None]:
        """Multiply a number of vectors with the matrix into a tensor."""

    @property
    def unpack(self) -> Callable[[Any, int, Tensor], None]:
        """Write dense rows, starting at a given row, into a tensor."""


@dataclass
class _Binding:
    """A kernel bound to the tensors that a layer had at that time.

    Attributes:
        tensors: mask, values, offsets and bias.
        dtype: dtype of the values.
        device: device of the values.
        kind: type of the device.
        kernel: the kernel; None if torch multiplies.
        matrix: the matrix prepared for the kernel.
        max_packed_batch: largest number of vectors for the packed product.
    """

    tensors: tuple[Tensor | None, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str
    kernel: Multiplier | None = None
    matrix: Any = None
    max_packed_batch: int = 0


class PackedLinear(nn.Module):
    """`y = x W^T + b` with W packed as in docs/reference/format.md.

    The layer is for inference: W is not a parameter and cannot be trained. The compiled kernel multiplies on a CPU, and
    kernels in Triton on a GPU. Without a kernel, or if gradients with respect to the input are required, torch unpacks
    some rows at a time and multiplies them densely, which is slower.

    Code that computes with `layer.weight` and not by calling the layer, as in Mamba and RWKV, unpacks it: the layer is
    dense from then on. Reading the shape, dtype or device of `layer.weight` does not.

    Args:
        packed: the weight (out, in); kernels need bfloat16, float16 or float32.
        bias: shape (out,), or None.
        inputs_first: `weight` has the shape (in, out), as in a `Conv1D`.

    Attributes:
        mask: mask of the packed weight, a buffer; None once the layer is dense.
        values: nonzero weights, a buffer; it is cast with the module.
        offsets: offsets of the rows in `values`, a buffer.
        in_features: number of inputs, as in `nn.Linear`.
        out_features: number of outputs, as in `nn.Linear`.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedMatrix, bias: Tensor | None = None, inputs_first: bool = False) -> None:
        super().__init__()
        self.inputs_first = inputs_first
        self.in_features, self.out_features = packed.columns, len(packed.mask)
        self.register_buffer("mask", packed.mask.contiguous())
        self.register_buffer("values", packed.values.contiguous())
        self.register_buffer("offsets", packed.offsets.contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._bound: _Binding | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., in) to (..., out), in the dtype of the values."""
        if "weight" in self._parameters:
            weight = self._unpack()
            return F.linear(input, weight.t() if self.inputs_first else weight, self.bias)
        # Calls and attribute lookups through the module are avoided: small layers take only ten microseconds.
        bound = self._current_binding()
        kernel, matrix = bound.kernel, bound.matrix
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            raise RuntimeError(f"the input has shape {tuple(shape)}, but the layer takes {self.in_features} features")
        if (
            kernel is None
            or input.dtype is not bound.dtype
            or (not input.is_cpu if bound.kind == "cpu" else input.device != bound.device)
            or torch.is_autocast_enabled(bound.kind)
            or (torch.is_grad_enabled() and (input.requires_grad or self._trains_bias()))
        ):
            return self._multiply_with_torch(input)
        x = input if input.is_contiguous() else input.contiguous()
        tokens = x.numel() // self.in_features
        out = x.new_empty((*shape[:-1], self.out_features))
        if tokens <= bound.max_packed_batch:
            kernel.linear(matrix, x, out, tokens)
        else:
            self._multiply_tiles(kernel, matrix, x.view(tokens, -1), out.view(tokens, self.out_features))
        return out

    @property
    def is_packed(self) -> bool:
        """False once the layer is dense."""
        return "weight" not in self._parameters

    @property
    def weight(self) -> Tensor:
        """Weight in the shape of the layer that was packed; computing with it makes the layer dense."""
        if not self.is_packed:
            return self._unpack()
        shape = (self.out_features, self.in_features)
        return LazyWeight(shape[::-1] if self.inputs_first else shape, self.values, self._unpack)

    def to_dense(self) -> Tensor:
        """Return a dense copy of the weight (out, in) on the layer's device, equal to the bit."""
        if not self.is_packed:
            weight = self._unpack().data
            return (weight.t() if self.inputs_first else weight).clone(memory_format=torch.contiguous_format)
        bound = self._current_binding()
        if bound.kernel is None:
            return torch.cat(list(self._tiles())) if self.out_features else self.values.new_empty(0, self.in_features)
        dense = self.values.new_empty(self.out_features, self.in_features)
        bound.kernel.unpack(bound.matrix, 0, dense)
        return dense

    def check(self) -> None:
        """Check that mask, values and offsets fit together, which products rely on.

        Raises:
            ValueError: if they do not.
        """
        if self.is_packed and self._current_binding().kernel is None:
            check_packed(self._packed())

    def extra_repr(self) -> str:
        """Describe the layer for `repr`."""
        weights = self.in_features * self.out_features
        kept = "empty" if not weights else f"{len(self.values) / weights:.2%} kept" if self.is_packed else "dense"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def _unpack(self) -> nn.Parameter:
        """Make the layer dense, unless it is, and return its weight."""
        if self.is_packed:
            with torch.inference_mode(False):
                dense = self.to_dense()
                stored = dense.t().contiguous() if self.inputs_first else dense
                self._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
            self._bound = None
            self._buffers.update(mask=None, values=None, offsets=None)
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _multiply_tiles(self, kernel: Multiplier, matrix: Any, x: Tensor, out: Tensor) -> None:
        """Multiply many vectors: unpack some rows at a time into one buffer, and multiply them densely.

        On a GPU torch's allocator reuses the memory of the buffer for every layer, in stream order and in CUDA graphs.
        A permanent buffer would need one copy per stream, and would occupy memory between calls.
        """
        count = self._tile_rows()
        tile = x.new_empty(min(count, self.out_features), self.in_features)
        if multiplies_by_float32(x.dtype, x.device):
            self._multiply_tiles_in_float32(kernel, matrix, x.float(), out=out, tile=tile)
            return
        for first in range(0, self.out_features, count):
            rows = tile[: self.out_features - first]
            kernel.unpack(matrix, first, rows)
            part = out[:, first : first + len(rows)]
            if self.bias is None:
                torch.mm(x, rows.t(), out=part)
            else:
                torch.addmm(self.bias[first : first + len(rows)], x, rows.t(), out=part)

    def _multiply_tiles_in_float32(
        self, kernel: Multiplier, matrix: Any, x: Tensor, *, out: Tensor, tile: Tensor
    ) -> None:
        """Multiply in float32 and round once, for processors without half-precision instructions."""
        wide, product = torch.empty_like(tile, dtype=torch.float32), x.new_empty(len(x), len(tile))
        for first in range(0, self.out_features, len(tile)):
            count = min(len(tile), self.out_features - first)
            kernel.unpack(matrix, first, tile[:count])
            rows, part = wide[:count].copy_(tile[:count]), product[:, :count]
            torch.mm(x, rows.t(), out=part)
            if self.bias is not None:
                part += self.bias[first : first + count]
            out[:, first : first + count] = part

    def _multiply_with_torch(self, input: Tensor) -> Tensor:
        if not self.out_features:
            return input.new_empty(*input.shape[:-1], 0)
        biases = itertools.repeat(None) if self.bias is None else torch.split(self.bias, self._tile_rows())
        parts = [F.linear(input, tile, bias) for tile, bias in zip(self._tiles(), biases, strict=False)]
        return torch.cat(parts, dim=-1)

    def _tiles(self) -> Iterator[Tensor]:
        """Yield the dense rows in tiles, unpacked by torch."""
        count = self._tile_rows()
        for first in range(0, self.out_features, count):
            yield unpack_rows(self._packed(), first, min(first + count, self.out_features))

    def _packed(self) -> PackedMatrix:
        return PackedMatrix(self.mask, self.values, self.offsets, self.in_features)

    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def _tile_rows(self) -> int:
        tile_bytes = _GPU_TILE_BYTES if self.values.is_cuda else _TILE_BYTES
        return max(tile_bytes // (self.in_features * self.values.element_size()), 1)

    def _current_binding(self) -> _Binding:
        """Return the binding, renewed if the tensors have been moved, cast or replaced."""
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

    def _bind(self) -> _Binding:
        values, bias = self.values, self.bias
        tensors = (self.mask, values, self.offsets, bias)
        bound = _Binding(tensors, values.dtype, values.device, values.device.type)
        kernel: Multiplier | None = find_kernel() if values.is_cpu else find_gpu_kernel(values.device)
        if kernel is None or values.dtype not in KINDS or (bias is not None and bias.dtype != values.dtype):
            return bound
        bound.kernel, bound.max_packed_batch = kernel, kernel.max_packed_batch(values.dtype)
        bound.matrix = kernel.bind(self._packed(), bias)
        return bound

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        # A parameter may receive new memory and remain the same object.
        self._bound = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}
