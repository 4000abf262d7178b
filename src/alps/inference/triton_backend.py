"""GPU backend: launch the kernels of `triton_kernels`, and prepare packed matrices for them."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import WORD_BITS, PackedMatrix, check_layout

# Dtypes of the values that the kernels multiply, and the largest number of vectors for the packed product.
MAX_PACKED_BATCH = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 4}
# Tile sizes and numbers of warps of each kernel, chosen by the instructions, registers and shared memory of the
# compiled code, not by timings. Tensor cores always multiply 16 vectors. Fusion of products and sums is set explicitly
# because triton's default is about to change.
_SHARED = {"num_warps": 4, "enable_fp_fusion": True}
BLOCKS: dict[str, dict[str, int]] = {
    "multiply_one": {"ROWS": 8, "OCTETS": 128, **_SHARED},
    "multiply_few": {"ROWS": 32, "OCTETS": 32, "TOKENS": 16, **_SHARED},
    "unpack": {"ROWS": 16, "OCTETS": 32, **_SHARED},
}


class GpuMatrix:
    """A packed matrix in the form of the kernels.

    Args:
        packed: matrix with contiguous tensors on one device.
        bias: shape (rows,) in the dtype of the values, or None.

    Attributes:
        starts: number of kept weights of a row before each segment of 64 columns, shape (rows, segments); int16, or
            int32 from 2^15 columns on. With it no thread waits for counts of other threads. Its 2 bytes for 64 weights
            are 1/64 of the dense matrix in 16 bits. It is computed from the mask and is not stored in files.

    Raises:
        ValueError: if the tensors do not fit together. The kernels rely on this check.
    """

    def __init__(self, packed: PackedMatrix, bias: Tensor | None) -> None:
        check_layout(packed, bias, MAX_PACKED_BATCH)
        mask, values, offsets, columns = packed.mask, packed.values, packed.offsets, packed.columns
        rows = len(mask)
        self.mask, self.values, self.offsets, self.bias, self.columns = mask, values, offsets, bias, columns
        counts = _set_bits(mask)
        ends = counts.cumsum(1, dtype=torch.int32)
        spare = mask[:, -1] >> (columns % WORD_BITS) if columns % WORD_BITS else mask.new_zeros(rows)
        expected = torch.zeros_like(offsets)
        if mask.shape[1]:
            expected[1:] = ends[:, -1].cumsum(0, dtype=offsets.dtype)
        # Combined on the device, so that the host waits for one number only.
        is_inconsistent = (expected != offsets).any() | spare.ne(0).any() | (offsets[-1] != len(values))
        if bool(is_inconsistent):
            raise ValueError("mask, offsets and values do not fit together")
        self.starts = (ends - counts)[:, ::2].to(torch.int16 if columns < 2**15 else torch.int32).contiguous()

    @property
    def words(self) -> int:
        """Number of mask words in a row."""
        return self.mask.shape[1]

    @property
    def segments(self) -> int:
        """Number of segments of 64 columns in a row."""
        return self.starts.shape[1]


class GpuKernel:
    """The Triton kernels with their tile sizes; each is compiled at its first call with a dtype and shape.

    Every call is queued on the current stream of the tensors' device without synchronisation, so that CUDA graphs can
    capture it. `torch.compile` does not trace into packed layers.

    Attributes:
        path: name of the backend.
    """

    path = "Triton"

    def __init__(self) -> None:
        from alps.inference import triton_kernels

        self._kernels: Any = triton_kernels
        self.linear = torch.compiler.disable(self._linear)  # type: ignore[no-untyped-call]
        self.unpack = torch.compiler.disable(self._unpack)  # type: ignore[no-untyped-call]

    def bind(self, packed: PackedMatrix, bias: Tensor | None) -> GpuMatrix:
        """Prepare a packed matrix with its bias for the other methods; see `GpuMatrix`."""
        return GpuMatrix(packed, bias)

    def max_packed_batch(self, dtype: torch.dtype) -> int:
        """Return the largest number of vectors that are multiplied faster packed than after unpacking the matrix."""
        return MAX_PACKED_BATCH[dtype]

    def _linear(self, matrix: GpuMatrix, x: Tensor, out: Tensor, tokens: int) -> None:
        """Write x (tokens, columns) times the transposed matrix, plus its bias, into out (tokens, rows).

        Both tensors must be contiguous and in the dtype of the matrix, with any leading shape. This is not checked.
        """
        rows, has_bias = len(matrix.mask), matrix.bias is not None
        if not rows or not tokens:
            return
        name = "multiply_one" if tokens == 1 or matrix.values.dtype == torch.float32 else "multiply_few"
        block = BLOCKS[name]
        grid = (-(-rows // block["ROWS"]), tokens if name == "multiply_one" else 1)
        arguments = [
            matrix.mask,
            matrix.values,
            matrix.offsets,
            matrix.starts,
            x,
            matrix.bias if has_bias else x,
            out,
            rows,
            matrix.columns,
            matrix.words,
            matrix.segments,
        ]
        if name == "multiply_few":
            arguments.append(tokens)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            getattr(self._kernels, name)[grid](*arguments, BIASED=has_bias, **block)

    def _unpack(self, matrix: GpuMatrix, first: int, out: Tensor) -> None:
        """Write rows `first` to `first + len(out)` into `out`, which is contiguous and in the dtype of the matrix."""
        if not out.numel():
            return
        block = BLOCKS["unpack"]
        grid = (-(-len(out) // block["ROWS"]), -(-matrix.columns // (8 * block["OCTETS"])))
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            self._kernels.unpack[grid](
                matrix.mask,
                matrix.values,
                matrix.offsets,
                matrix.starts,
                out,
                first,
                first + len(out),
                matrix.columns,
                matrix.words,
                matrix.segments,
                **block,
            )


def find_gpu_kernel(device: torch.device) -> GpuKernel | None:
    """Return the kernels for a device; None without triton, and on devices that they do not support."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return _compiled_kernel()


def describe_gpu(kernel: GpuKernel | None) -> str:
    """Describe in words how packed layers are multiplied on a GPU."""
    return "torch only, no triton for this GPU" if kernel is None else f"kernels in {kernel.path}"


@functools.cache
def _compiled_kernel() -> GpuKernel | None:
    return GpuKernel() if importlib.util.find_spec("triton") is not None else None


def _set_bits(words: Tensor) -> Tensor:
    """Count the set bits of each int32, as int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return words + (words >> 8) + (words >> 16) + (words >> 24) & 63
