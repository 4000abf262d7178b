"""Tests of the compiled kernel: every instruction set against float64, memory bounds and numbers of threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.checkpoints.bitmask_codec import BIT_DTYPES, PackedMatrix, pack
from alps.inference import build_kernel as building
from alps.inference import cpu_backend as native
from alps.inference.build_kernel import LIBRARY_NAME, SOURCES, compile_library
from alps.inference.cpu_backend import Kernel, Matrix

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}
CHECK = Path(__file__).parent / "paths.c"


def sparse(rows: int, columns: int, kept: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return torch.where(torch.rand(rows, columns, generator=generator) < kept, weight, torch.zeros((), dtype=dtype))


def matrix(kernel: Kernel, weight: Tensor, bias: Tensor | None = None) -> Matrix:
    return Matrix(kernel, pack(weight), bias)


def multiply(kernel: Kernel, packed: Matrix, x: Tensor) -> Tensor:
    out = torch.full((len(x), packed.fields.rows), torch.nan, dtype=x.dtype)
    kernel.linear(packed, x, out, len(x))
    return out


def assert_close(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that products are exact up to one rounding to the dtype and the error of float32 sums."""
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    bound = DTYPES[weight.dtype] * exact.abs() + 2e-6 * most + (6e-8 if weight.dtype == torch.float16 else 0)
    assert result.dtype == weight.dtype and bool(((result.double() - exact).abs() <= bound).all())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    kept=st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    tokens=st.integers(1, 20) | st.integers(30, 70),
    dtype=st.sampled_from(list(DTYPES)),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_path_multiplies_and_unpacks(
    kernel_file: Path, rows: int, columns: int, kept: float, tokens: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    weight = sparse(rows, columns, kept, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    for path in Kernel(kernel_file).paths:
        kernel = Kernel(kernel_file, path)
        packed = matrix(kernel, weight, bias)
        assert_close(multiply(kernel, packed, x), x, weight, bias)
        for first in {0, rows // 2}:
            dense = torch.full((rows - first, columns), torch.nan, dtype=dtype)
            kernel.unpack(packed, first, dense)
            assert torch.equal(dense, weight[first:]), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_threads(kernel_file: Path, dtype: torch.dtype, threads: None) -> None:
    # Large enough for three threads, with rows of very different lengths and many empty ones.
    weight = sparse(700, 1000, 0.4, dtype, 5) * (torch.arange(700) % 7 < 3)[:, None]
    weight[600:] = 0
    x = torch.randn(11, 1000, generator=torch.Generator().manual_seed(6)).to(dtype)
    for path in Kernel(kernel_file).paths:
        kernel = Kernel(kernel_file, path)
        packed = matrix(kernel, weight)
        result = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dense = torch.empty_like(weight)
            kernel.unpack(packed, 0, dense)
            assert torch.equal(dense, weight)
            result.append(multiply(kernel, packed, x))
        assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2]), path
        assert_close(result[0], x, weight, None)


def test_torch_products_are_unaffected(kernel_file: Path) -> None:
    """Check torch's products after the kernel's, which configures the same registers in another way."""
    weight, x = sparse(64, 96, 0.5, torch.bfloat16, 3), torch.randn(33, 96).bfloat16()
    left, right = torch.randn(128, 256).bfloat16(), torch.randn(256, 192).bfloat16()
    expected = left @ right
    for path in Kernel(kernel_file).paths:
        kernel = Kernel(kernel_file, path)
        packed = matrix(kernel, weight)
        for tokens in (1, 5, 33):
            first = multiply(kernel, packed, x[:tokens])
            assert torch.equal(left @ right, expected), path
            assert torch.equal(multiply(kernel, packed, x[:tokens]), first), path
            assert torch.equal(left @ right, expected), path
            assert_close(first, x[:tokens], weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bit_patterns_are_restored(kernel_file: Path, dtype: torch.dtype) -> None:
    """Include negative zeros, subnormals, infinities and NaNs with their payloads."""
    bits = BIT_DTYPES[dtype.itemsize]
    info = torch.iinfo(bits)
    there = torch.randint(info.min, info.max, (64, 100), generator=torch.Generator().manual_seed(1), dtype=bits)
    there[torch.rand(64, 100, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    there[:, 3] = info.min
    for path in Kernel(kernel_file).paths:
        kernel, out = Kernel(kernel_file, path), torch.empty(64, 100, dtype=dtype)
        kernel.unpack(matrix(kernel, there.view(dtype)), 0, out)
        assert torch.equal(out.view(bits), there), path


def test_the_kernel_uses_torch_threads(kernel_file: Path) -> None:
    entry = native._openmp()
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        pytest.skip("this torch has no OpenMP")
    assert entry is not None and ctypes.cast(entry, ctypes.c_void_p).value


def test_inconsistent_matrices_are_rejected(kernel_file: Path) -> None:
    kernel, packed = Kernel(kernel_file), pack(sparse(8, 40, 0.5, torch.bfloat16, 0))
    mask, values, offsets = packed.mask, packed.values, packed.offsets
    # A weight in column 52 of 40 takes the place of one in the same row.
    spare, moved = mask.clone(), offsets.clone()
    spare[2, 0] &= spare[2, 0] - 1
    spare[2, 1] |= 1 << 20
    moved[3] += 1
    wide = torch.randn(8).bfloat16()
    for packed, bad_bias in (
        (PackedMatrix(spare, values, offsets, 40), None),
        (PackedMatrix(mask, values, moved, 40), None),
        (PackedMatrix(mask, values[:-1].clone(), offsets, 40), None),
        (PackedMatrix(mask, values, offsets[:-1].clone(), 40), None),
        (PackedMatrix(mask, values, offsets, 65), None),
        (PackedMatrix(mask, values.double(), offsets, 40), None),
        (PackedMatrix(mask.T, values, offsets, 40), None),
        (PackedMatrix(mask, values, offsets, 40), wide.float()),
        (PackedMatrix(mask, values, offsets, 40), wide[1:]),
    ):
        with pytest.raises(ValueError):
            Matrix(kernel, packed, bad_bias)
    Matrix(kernel, PackedMatrix(mask, values, offsets.long(), 40), wide)


def run_paths(library: Path, folder: Path, compiler: str, launcher: list[str]) -> list[str]:
    """Run paths.c, which places every array directly before memory that must not be touched."""
    program = folder / "paths"
    command = [compiler, "-std=gnu11", "-O1", f"-I{SOURCES}", str(CHECK), str(library), "-o", str(program), "-lm"]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}"], check=True)
    done = subprocess.run([*launcher, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout)
    return done.stdout.split()


def test_no_byte_is_touched_past_the_arrays(kernel_file: Path, tmp_path: Path) -> None:
    compiler = building._compiler()
    assert compiler is not None
    assert run_paths(kernel_file, tmp_path, compiler[0], []) == Kernel(kernel_file).paths


def test_the_arm_path_in_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if not (shutil.which(compiler) and shutil.which(emulator)):
        pytest.skip(f"needs {compiler} and {emulator}")
    library = tmp_path / LIBRARY_NAME
    assert compile_library(library, [compiler]) is None
    assert run_paths(library, tmp_path, compiler, [emulator, "-L", "/usr/aarch64-linux-gnu"]) == ["portable", "neon"]


def test_a_library_of_another_version_is_not_used(
    kernel_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.find_kernel.__wrapped__() is None
    shutil.copy(kernel_file, tmp_path / LIBRARY_NAME)
    result = native.find_kernel.__wrapped__()
    assert result is not None and native.describe(result) == f"kernel {result.paths[-1]}"
    with pytest.raises(ValueError):
        Kernel(kernel_file, "none")
    monkeypatch.setattr(native, "VERSION", 99)
    assert native.find_kernel.__wrapped__() is None
    assert "torch only" in native.describe(None)
