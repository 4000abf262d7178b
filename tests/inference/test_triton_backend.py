"""Tests of the GPU kernels without a GPU: in triton's interpreter, and compiled for two generations of GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alps.checkpoints.bitmask_codec import PackedMatrix, pack
from alps.inference import text_generation
from alps.inference import triton_backend as gpu
from alps.inference.cpu_backend import describe, find_kernel
from alps.inference.triton_backend import BLOCKS, MAX_PACKED_BATCH, GpuKernel, describe_gpu, find_gpu_kernel
from helpers.cli_process import run_code

CASES = Path(__file__).parent.parent / "helpers" / "triton_cases.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install -e '.[gpu-test]'"
)


def run_cases(interpret: str) -> str:
    """Run triton_cases.py in a new process, because interpretation is chosen when triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parent.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_the_cases_in_the_interpreter() -> None:
    result = re.search(r"(\d+) passed, 1 skipped", run_cases("1"))
    assert result is not None and int(result[1]) >= 37


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cases_compiled_on_a_gpu() -> None:
    assert "skipped" not in run_cases("0")


class Launches:
    """Replacement for the module of kernels that compiles every launch, for a GPU that need not exist.

    Arguments, their types and alignments, and options are those of the launch.
    """

    def __init__(self, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver

        from alps.inference import triton_kernels

        target = GPUTarget("cuda", capability, 32)
        # Triton caches compiled kernels by device.
        functions = {"get_current_device": lambda: capability, "get_current_stream": lambda _: 0}
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: target, **functions))
        self._module = triton_kernels
        self.compiled: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return self._Grids(self, getattr(self._module, name))

    class _Grids:
        def __init__(self, launches: Launches, function: Any) -> None:
            self._launches, self._function = launches, function

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_instead(*arguments: object, **options: object) -> None:
                self._launches.compiled.append(self._function.warmup(*arguments, grid=grid, **options))

            return compile_instead


@pytest.fixture
def launches(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Compile for the test's compute capability, without triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return Launches(request.getfixturevalue("capability"), monkeypatch)


def launch(launches: Launches, name: str, dtype: torch.dtype, columns: int = 256, first: int = 0) -> Any:
    """Return the code compiled for a product or unpacking of tensors at `first` elements into their memory."""
    generator = torch.Generator().manual_seed(0)
    packed = pack((torch.rand(40, columns, generator=generator) > 0.7).to(dtype))
    memory = [
        packed.mask,
        packed.values,
        packed.offsets,
        *(torch.zeros(n, dtype=dtype) for n in (columns * 3, 120, 40)),
    ]
    shifted = [torch.cat([part.flatten()[:first], part.flatten()])[first:].view(part.shape) for part in memory]
    mask, values, offsets, x, out, bias = shifted
    kernel = GpuKernel()
    kernel._kernels = launches
    parts = PackedMatrix(mask, values, offsets.long() if first else offsets, columns)
    matrix = kernel.bind(parts, None if first else bias)
    if name == "unpack":
        kernel.unpack(matrix, 1, torch.zeros(39 * columns + first, dtype=dtype)[first:].view(39, columns))
    else:
        kernel.linear(matrix, x, out, 1 if name == "multiply_one" else 3)
    (compiled,) = launches.compiled
    assert compiled.metadata.name == name
    return compiled


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Return the registers of a thread, and the bytes of its stack and spilled registers, from triton's tool."""
    import triton

    file, tool = folder / "kernel.cubin", Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file.write_bytes(cubin)
    done = subprocess.run([str(tool), "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("multiply_one", dtype) for dtype in MAX_PACKED_BATCH),
        ("multiply_few", torch.bfloat16),
        ("multiply_few", torch.float16),
        ("unpack", torch.bfloat16),
        ("unpack", torch.float32),
    ],
)
def test_kernels_compile(name: str, dtype: torch.dtype, capability: int, launches: Launches, tmp_path: Path) -> None:
    kernel = launch(launches, name, dtype)
    code, used = kernel.asm["ptx"], usage(kernel.asm["cubin"], tmp_path)
    assert f".target sm_{capability}" in code
    # No register is spilled, and 65,536 registers suffice for 4 blocks of 4 warps (2 with tensor cores).
    most = 192 if name == "multiply_few" else 128
    assert used["STACK"] == used["LOCAL"] == 0 and 16 < used["REG"] <= most, used
    # One instruction counts the bits of a word, for the two words around each octet of a thread.
    block = BLOCKS[name]
    octets = block["ROWS"] * block["OCTETS"] // (32 * block["num_warps"])
    assert code.count("popc.b32") == 2 * octets
    # Every bit has a predicated load, so that no lane reads a weight that is not kept.
    loads = re.findall(rf"@%p\d+ ld\.global\.b{8 * dtype.itemsize} ", code)
    assert len(loads) >= 8 * octets
    if name == "unpack":
        # A thread stores 8 neighbours together, 16 bytes at a time.
        assert re.findall(r"st\.global\S*", code) == ["st.global.v4.b32"] * (octets * dtype.itemsize // 2)
    if name == "multiply_few":
        # Vectors are loaded asynchronously, 16 bytes at a time, without registers.
        assert "mma.sync" in code and re.search(
            r"cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ \d+ \], \[ %rd\d+ \+ 0 \], 0x10", code
        )


@needs_triton
@pytest.mark.parametrize("capability", [90])
@pytest.mark.parametrize("name", BLOCKS)
def test_other_launches_compile(name: str, capability: int, launches: Launches, tmp_path: Path) -> None:
    """Use odd sizes, unaligned addresses, offsets of 64 bits, and no bias."""
    used = usage(launch(launches, name, torch.bfloat16, columns=77, first=1).asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


def test_the_gpu_kernel_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, machine = torch.device("cuda:1"), {"capability": (8, 0), "triton": True}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    kernel: Any = object()
    monkeypatch.setattr(gpu, "GpuKernel", lambda: kernel)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if machine["triton"] else None)
    monkeypatch.setattr(gpu, "_compiled_kernel", gpu._compiled_kernel.__wrapped__)
    assert find_gpu_kernel(device) is kernel
    assert find_gpu_kernel(torch.device("cpu")) is None and find_gpu_kernel(torch.device("meta")) is None
    machine["capability"] = (7, 5)
    assert find_gpu_kernel(device) is None
    machine["capability"], machine["triton"] = (12, 0), False
    assert find_gpu_kernel(device) is None
    machine["triton"] = True
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert find_gpu_kernel(device) is None
    assert "torch only" in describe_gpu(None)


_LAZY = """
import sys
import torch
before = set(sys.modules)
import alps
from alps.checkpoints.bitmask_codec import PackedMatrix, pack
from alps.inference.packed_linear import PackedLinear
layer = PackedLinear(pack(torch.eye(8)))
layer(torch.ones(1, 8))
layer.to("meta")
print("alps.inference.triton_kernels" in sys.modules)
"""


def test_triton_is_not_imported_for_a_cpu() -> None:
    done = run_code(_LAZY)
    assert done.stdout.strip() == "False", done.stderr


@needs_triton
def test_the_backend_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the words in the summary of `alps generate`."""
    assert describe_gpu(GpuKernel()) == "kernels in Triton"
    layer: Any = SimpleNamespace(values=SimpleNamespace(device=torch.device("cuda:0")))
    for kernel, words in ((GpuKernel(), "kernels in Triton"), (None, "torch only, no triton for this GPU")):
        monkeypatch.setattr(text_generation, "find_gpu_kernel", lambda device, kernel=kernel: kernel)
        assert text_generation._describe_kernel(layer) == words
    layer.values.device = torch.device("cpu")
    assert text_generation._describe_kernel(layer) == describe(find_kernel())
