"""The compiled library: found, loaded, and asked which instruction sets this processor has.

It is plain C, called through ctypes, which lets other Python threads run meanwhile; it knows nothing of torch but the
threads, which are torch's own (csrc/threads.c says why).
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
# Dtypes of the values that it multiplies.
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

# With so many vectors of bfloat16 torch's own product catches up, unpacking included.
_FEW = {"amx": sys.maxsize, "avx512bf16": 128}


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
    """A packed matrix as the library takes it, with the tensors that it points into.

    Args:
        mask, values, offsets: as in `alps.checkpoints.bitmask_codec.PackedMatrix`, contiguous, on the CPU.
        columns: of the matrix.
        bias: (rows) in the dtype of the values, or None.

    Raises:
        ValueError: when they contradict each other.
    """

    def __init__(
        self, kernel: Kernel, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None
    ) -> None:
        check_layout(PackedMatrix(mask, values, offsets, columns), bias, KINDS)
        if not values.is_cpu:
            raise ValueError("the library reads matrices on the CPU alone")
        self.tensors = (mask, values, offsets, bias)
        rows, words = mask.shape
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        wide = offsets.dtype == torch.int64
        self.fields = _Matrix(*pointers, rows, columns, words, len(values), wide, KINDS[values.dtype])
        self.pointer = byref(self.fields)
        if not kernel.library.alps_is_sound(self.pointer):
            raise ValueError("mask, offsets and values do not fit together")


class Kernel:
    """The library with one instruction set chosen.

    Attributes:
        path: name of the instruction set: `portable`, `neon`, `avx2`, `avx512`, `avx512bf16` or
            `amx`.
        paths: all that this processor has, the best last.

    Args:
        file: the library.
        path: the instruction set; None for the best.

    Raises:
        OSError: when the file cannot be loaded, or another version of the sources made it.
        ValueError: when the processor lacks `path`.
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

    def bind(self, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None) -> Matrix:
        """The matrix for the other methods; see `Matrix`."""
        return Matrix(self, mask, values, offsets, columns, bias)

    def few(self, dtype: torch.dtype) -> int:
        """Up to so many vectors are multiplied with a packed matrix faster than with one unpacked for them."""
        if dtype == torch.bfloat16 and self.path in _FEW:
            return _FEW[self.path]
        return 16 if self.path in _FEW or (self.path == "avx2" and dtype != torch.float32) else 8

    def linear(self, matrix: Matrix, x: Tensor, out: Tensor, tokens: int) -> None:
        """Write x (tokens, columns) times the transposed matrix, plus its bias, into out (tokens, rows).

        Both are contiguous, in the matrix's dtype and of any leading shape; nothing here checks it.
        """
        threads = torch.get_num_threads()
        if self.multiply(matrix.pointer, x.data_ptr(), out.data_ptr(), tokens, threads, self.index):
            raise MemoryError

    def unpack(self, matrix: Matrix, first: int, out: Tensor) -> None:
        """Write rows `first` to `first + len(out)` into `out`, contiguous and in the matrix's dtype."""
        pointer, threads = out.data_ptr(), torch.get_num_threads()
        self.library.alps_unpack(matrix.pointer, first, first + len(out), pointer, threads, self.index)


@functools.cache
def find_kernel() -> Kernel | None:
    """The library beside this file with the best instruction set, or None where it was not built or does not load."""
    file = Path(__file__).parent / LIBRARY_NAME
    try:
        return Kernel(file) if file.is_file() else None
    except OSError:
        return None


def describe(kernel: Kernel | None) -> str:
    """In words what multiplies on a CPU."""
    return "torch alone, the kernel was not built" if kernel is None else f"kernel {kernel.path}"


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
    """The entry of torch's own OpenMP runtime, looked up among what its library was linked to."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    return None
