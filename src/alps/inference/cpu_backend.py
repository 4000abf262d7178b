"""CPU backend: load the compiled library, and choose an instruction set of this processor.

The library is plain C and is called through ctypes, so that other Python threads run during a call. It does not depend
on torch, but it runs on torch's OpenMP threads; csrc/threads.c explains why.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from alps.checkpoints.bitmask_codec import PackedMatrix, check_layout
from alps.inference.build_kernel import LIBRARY_NAME

VERSION = 1  # ALPS_VERSION of kernel.h
# Dtypes of the values that the library multiplies, with their number in kernel.h.
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

# Up to this many vectors of bfloat16 the packed product is faster than unpacking followed by torch's own product.
_MAX_PACKED_BATCH = {"amx": sys.maxsize, "avx512bf16": 128}


class _Matrix(ctypes.Structure):
    """`alps_matrix` of kernel.h."""

    _fields_ = (
        ("mask", c_void_p),
        ("values", c_void_p),
        ("offsets", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("words", c_int64),
        ("kept", c_int64),
        ("wide", c_int),
        ("kind", c_int),
    )


class Matrix:
    """A packed matrix in the form of the library, with references to the tensors that it points into.

    Args:
        kernel: the library.
        packed: matrix with contiguous tensors on the CPU.
        bias: shape (rows,) in the dtype of the values, or None.

    Raises:
        ValueError: if the tensors do not fit together.
    """

    def __init__(self, kernel: Kernel, packed: PackedMatrix, bias: Tensor | None) -> None:
        check_layout(packed, bias, KINDS)
        mask, values, offsets = packed.mask, packed.values, packed.offsets
        if not values.is_cpu:
            raise ValueError("the library only reads matrices on the CPU")
        self.tensors = (mask, values, offsets, bias)
        rows, words = mask.shape
        self.fields = _Matrix(
            mask=mask.data_ptr(),
            values=values.data_ptr(),
            offsets=offsets.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            rows=rows,
            columns=packed.columns,
            words=words,
            kept=len(values),
            wide=offsets.dtype == torch.int64,
            kind=KINDS[values.dtype],
        )
        self.pointer = byref(self.fields)
        if not kernel.library.alps_is_sound(self.pointer):
            raise ValueError("mask, offsets and values do not fit together")


class Kernel:
    """The library with a chosen instruction set.

    Attributes:
        path: name of the instruction set: `portable`, `neon`, `avx2`, `avx512`, `avx512bf16` or `amx`.
        paths: all instruction sets of this processor, from slow to fast.

    Args:
        file: the library.
        path: the instruction set; None for the fastest.

    Raises:
        OSError: if the file cannot be loaded, or was built from another version of the sources.
        ValueError: if the processor does not have the instruction set `path`.
    """

    def __init__(self, file: Path, path: str | None = None) -> None:
        self.library = ctypes.CDLL(str(file))
        _declare(self.library)
        if self.library.alps_start(_openmp()) != VERSION:
            raise OSError("it was built from other sources")
        names: list[str] = []
        while (name := self.library.alps_path_name(len(names))) is not None:
            names.append(name.decode())
        self.paths = [name for name in names if name]
        self.path = path or self.paths[-1]
        self.index = names.index(self.path)
        self.multiply = self.library.alps_multiply

    def bind(self, packed: PackedMatrix, bias: Tensor | None) -> Matrix:
        """Prepare a packed matrix with its bias for the other methods; see `Matrix`."""
        return Matrix(self, packed, bias)

    def max_packed_batch(self, dtype: torch.dtype) -> int:
        """Return the largest number of vectors that are multiplied faster packed than after unpacking the matrix."""
        if dtype == torch.bfloat16 and self.path in _MAX_PACKED_BATCH:
            return _MAX_PACKED_BATCH[self.path]
        return 16 if self.path in _MAX_PACKED_BATCH or (self.path == "avx2" and dtype != torch.float32) else 8

    def linear(self, matrix: Matrix, x: Tensor, out: Tensor, tokens: int) -> None:
        """Write x (tokens, columns) times the transposed matrix, plus its bias, into out (tokens, rows).

        Both tensors must be contiguous and in the dtype of the matrix, with any leading shape. This is not checked.
        """
        threads = torch.get_num_threads()
        if self.multiply(matrix.pointer, x.data_ptr(), out.data_ptr(), tokens, threads, self.index):
            raise MemoryError

    def unpack(self, matrix: Matrix, first: int, out: Tensor) -> None:
        """Write rows `first` to `first + len(out)` into `out`, which is contiguous and in the dtype of the matrix."""
        pointer, threads = out.data_ptr(), torch.get_num_threads()
        self.library.alps_unpack(matrix.pointer, first, first + len(out), pointer, threads, self.index)


@functools.cache
def find_kernel() -> Kernel | None:
    """Return the library with the fastest instruction set, or None if it was not built or cannot be loaded."""
    file = Path(__file__).parent / LIBRARY_NAME
    try:
        return Kernel(file) if file.is_file() else None
    except OSError:
        return None


def describe(kernel: Kernel | None) -> str:
    """Describe in words how packed layers are multiplied on a CPU."""
    return "torch only, the kernel was not built" if kernel is None else f"kernel {kernel.path}"


def _declare(library: ctypes.CDLL) -> None:
    matrix = POINTER(_Matrix)
    library.alps_start.argtypes = [c_void_p]
    library.alps_path_name.argtypes = [c_int]
    library.alps_path_name.restype = c_char_p
    library.alps_is_sound.argtypes = [matrix]
    library.alps_multiply.argtypes = [matrix, c_void_p, c_void_p, c_int64, c_int, c_int]
    library.alps_unpack.argtypes = [matrix, c_int64, c_int64, c_void_p, c_int, c_int]
    library.alps_unpack.restype = None


def _openmp() -> c_void_p | None:
    """Return the entry of the OpenMP runtime that torch is linked to; None if there is none."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    return None
