"""Packed products on a GPU: the kernels of `triton_kernels`, and what they need beside the packed matrix."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import WORD_BITS, PackedMatrix, check_layout

# Dtypes of the values that are multiplied packed, and up to how many vectors at once.
FEW = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 4}
# Sizes of tiles and numbers of warps, by the name of the kernel: chosen by the instructions, registers and shared
# memory of what is compiled, not by times. Tensor cores multiply 16 vectors in any case. Fusion of products and sums is
# asked for because triton's default is about to change.
_SHARED = {"num_warps": 4, "enable_fp_fusion": True}
BLOCKS: dict[str, dict[str, int]] = {
    "multiply_one": {"ROWS": 8, "OCTETS": 128, **_SHARED},
    "multiply_few": {"ROWS": 32, "OCTETS": 32, "TOKENS": 16, **_SHARED},
    "unpack": {"ROWS": 16, "OCTETS": 32, **_SHARED},
}


class GpuMatrix:
    """A packed matrix as the kernels take it.

    Args:
        mask, values, offsets: as in `alps.checkpoints.bitmask_codec.PackedMatrix`, contiguous, on one device.
        columns: of the matrix.
        bias: (rows) in the dtype of the values, or None.

    Attributes:
        starts: (rows, segments of 64 columns), how many weights of a row are kept before each segment: int16, or int32
            from 2^15 columns on. With it no thread waits for what others have counted. 2 bytes for 64 weights are 1/64
            of the dense matrix in 16 bits. It is made here, in a few passes over the mask, and is in no file.

    Raises:
        ValueError: when they contradict each other. Nothing is checked later, and the kernels rely on it.
    """

    def __init__(self, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None) -> None:
        check_layout(PackedMatrix(mask, values, offsets, columns), bias, FEW)
        rows = len(mask)
        self.mask, self.values, self.offsets, self.bias, self.columns = mask, values, offsets, bias, columns
        counts = _set_bits(mask)
        ends = counts.cumsum(1, dtype=torch.int32)
        spare = mask[:, -1] >> (columns % WORD_BITS) if columns % WORD_BITS else mask.new_zeros(rows)
        expected = torch.zeros_like(offsets)
        if mask.shape[1]:
            expected[1:] = ends[:, -1].cumsum(0, dtype=offsets.dtype)
        # One number for the host to wait for.
        wrong = (expected != offsets).any() | spare.ne(0).any() | (offsets[-1] != len(values))
        if bool(wrong):
            raise ValueError("mask, offsets and values do not fit together")
        self.starts = (ends - counts)[:, ::2].to(torch.int16 if columns < 2**15 else torch.int32).contiguous()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns, words and segments of a row."""
        return self.columns, self.mask.shape[1], self.starts.shape[1]


class GpuKernel:
    """The kernels, with the sizes of their tiles; they are compiled when a dtype and shape is first met.

    Every call is put on the current stream of the tensors' own device and waits for nothing, so that CUDA graphs can
    hold it. `torch.compile` leaves packed layers as they are.

    Attributes:
        path: what multiplies.
    """

    path = "Triton"

    def __init__(self) -> None:
        from alps.inference import triton_kernels

        self._kernels: Any = triton_kernels
        self.linear = torch.compiler.disable(self._linear)  # type: ignore[no-untyped-call]
        self.unpack = torch.compiler.disable(self._unpack)  # type: ignore[no-untyped-call]

    def bind(self, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None) -> GpuMatrix:
        """The matrix for the other methods; see `GpuMatrix`."""
        return GpuMatrix(mask, values, offsets, columns, bias)

    def few(self, dtype: torch.dtype) -> int:
        """Up to so many vectors are multiplied with a packed matrix faster than with one unpacked for them."""
        return FEW[dtype]

    def _linear(self, matrix: GpuMatrix, x: Tensor, out: Tensor, tokens: int) -> None:
        """Write x (tokens, columns) times the transposed matrix, plus its bias, into out (tokens, rows).

        Both are contiguous, in the matrix's dtype and of any leading shape; nothing here checks it.
        """
        rows, biased = len(matrix.mask), matrix.bias is not None
        if not rows or not tokens:
            return
        parts = (matrix.mask, matrix.values, matrix.offsets, matrix.starts)
        fixed = (*parts, x, matrix.bias if biased else x, out, rows, *matrix.sizes)
        name = "multiply_one" if tokens == 1 or matrix.values.dtype == torch.float32 else "multiply_few"
        block = BLOCKS[name]
        grid = (-(-rows // block["ROWS"]), tokens if name == "multiply_one" else 1)
        count = () if name == "multiply_one" else (tokens,)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            getattr(self._kernels, name)[grid](*fixed, *count, BIASED=biased, **block)

    def _unpack(self, matrix: GpuMatrix, first: int, out: Tensor) -> None:
        """Write rows `first` to `first + len(out)` into `out`, contiguous and in the matrix's dtype."""
        if not out.numel():
            return
        parts = (matrix.mask, matrix.values, matrix.offsets, matrix.starts)
        block = BLOCKS["unpack"]
        grid = (-(-len(out) // block["ROWS"]), -(-matrix.columns // (8 * block["OCTETS"])))
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            self._kernels.unpack[grid](*parts, out, first, first + len(out), *matrix.sizes, **block)


def find_gpu_kernel(device: torch.device) -> GpuKernel | None:
    """The kernels for a GPU; None without triton, and on GPUs that they are not written for."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return _compiled_kernel()


def describe_gpu(kernel: GpuKernel | None) -> str:
    """In words what multiplies on a GPU."""
    return "torch alone, no triton for this GPU" if kernel is None else f"kernels in {kernel.path}"


@functools.cache
def _compiled_kernel() -> GpuKernel | None:
    return GpuKernel() if importlib.util.find_spec("triton") is not None else None


def _set_bits(words: Tensor) -> Tensor:
    """How many bits of each int32 are set, as int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return words + (words >> 8) + (words >> 16) + (words >> 24) & 63
