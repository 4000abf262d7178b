"""Tests of the GPU kernels against float64, compiled on a GPU, or else in triton's interpreter on the CPU.

Not collected by itself: test_triton_backend.py runs it with TRITON_INTERPRET=1, which has to be set before triton is
imported. With a GPU, `pytest tests/helpers/triton_cases.py` is the check that the kernels do there what they should.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alps
from alps.checkpoints.bitmask_codec import BIT_DTYPES, PackedMatrix, pack
from alps.inference import packed_linear as linear
from alps.inference import triton_backend as gpu
from alps.inference.packed_linear import PackedLinear
from alps.inference.triton_backend import MAX_PACKED_BATCH, GpuKernel, GpuMatrix, find_gpu_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# One rounding to the dtype; the interpreter truncates to bfloat16.
ROUNDING = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}


def sparse(rows: int, columns: int, kept: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    there = torch.rand(rows, columns, generator=generator) < kept
    return torch.where(there, weight, torch.zeros((), dtype=dtype))


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(kernel: GpuKernel, weight: Tensor, bias: Tensor | None = None) -> GpuMatrix:
    packed = pack(weight)
    parts = (packed.mask.to(DEVICE), packed.values.to(DEVICE), packed.offsets.to(DEVICE))
    return kernel.bind(PackedMatrix(*parts, packed.columns), None if bias is None else bias.to(DEVICE))


def multiply(kernel: GpuKernel, matrix: GpuMatrix, x: Tensor) -> Tensor:
    out = torch.full((len(x), len(matrix.mask)), torch.nan, dtype=x.dtype, device=DEVICE)
    kernel.linear(matrix, x.to(DEVICE), out, len(x))
    return out.cpu()


def unpacked(kernel: GpuKernel, matrix: GpuMatrix, first: int, last: int) -> Tensor:
    out = torch.full((last - first, matrix.columns), torch.nan, dtype=matrix.values.dtype, device=DEVICE)
    kernel.unpack(matrix, first, out)
    return out.cpu()


def assert_close(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that products are exact up to one rounding to the dtype and the error of float32 sums."""
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    bound = ROUNDING[weight.dtype] * exact.abs() + 2e-6 * most + (6e-8 if weight.dtype == torch.float16 else 0)
    assert result.dtype == weight.dtype and bool(((result.double() - exact).abs() <= bound).all())


@pytest.fixture(scope="module")
def kernel() -> Iterator[GpuKernel]:
    """Return the kernels; the interpreter takes bfloat16 for integers, so products are patched there."""
    result = GpuKernel()
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime import interpreter

            plain = interpreter.InterpreterBuilder.create_dot

            def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
                return plain(self, _widened(left), _widened(right), *rest)

            patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield result


def _widened(operand: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 65), (9, 1100)])
def test_products(kernel: GpuKernel, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    x = random(min(tokens, MAX_PACKED_BATCH[dtype]), columns, dtype=dtype)
    weight = sparse(rows, columns, 0.3, dtype, rows)
    bias = random(rows, dtype=dtype, seed=2)
    assert_close(multiply(kernel, bound(kernel, weight, bias), x), x, weight, bias)


@settings(max_examples=12 if INTERPRETED else 200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 320),
    kept=st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0]),
    tokens=st.integers(1, 16),
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_matrix(
    kernel: GpuKernel, rows: int, columns: int, kept: float, tokens: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    weight = sparse(rows, columns, kept, dtype, seed)
    x = random(min(tokens, MAX_PACKED_BATCH[dtype]), columns, dtype=dtype, seed=seed + 1)
    bias = random(rows, dtype=dtype, seed=seed + 2) if biased else None
    matrix = bound(kernel, weight, bias)
    assert_close(multiply(kernel, matrix, x), x, weight, bias)
    for first, last in {(0, rows), (rows // 2, rows), (rows // 3, rows // 3 + 1)}:
        assert torch.equal(unpacked(kernel, matrix, first, last), weight[first:last])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_empty_and_full_rows(kernel: GpuKernel, dtype: torch.dtype) -> None:
    weight = sparse(34, 130, 0.5, dtype, 3)
    weight[::3] = 0
    weight[1::3] = 1
    weight[30:] = 0
    for tokens in (1, 3):
        x = random(tokens, 130, dtype=dtype)
        assert_close(multiply(kernel, bound(kernel, weight), x), x, weight, None)
    assert torch.equal(unpacked(kernel, bound(kernel, weight), 0, 34), weight)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_all_bit_patterns_are_restored(kernel: GpuKernel, dtype: torch.dtype) -> None:
    """Include negative zeros, subnormals, infinities and NaNs with their payloads."""
    bits = BIT_DTYPES[dtype.itemsize]
    info = torch.iinfo(bits)
    there = torch.randint(info.min, info.max, (20, 100), generator=torch.Generator().manual_seed(1), dtype=bits)
    there[torch.rand(20, 100, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    there[:, 3] = info.min
    assert torch.equal(unpacked(kernel, bound(kernel, there.view(dtype)), 0, 20).view(bits), there)


def test_offsets_and_positions_beyond_16_bits(kernel: GpuKernel) -> None:
    """Use rows with more columns than int16 can count, and offsets of 64 bits as for matrices of 2^31 weights."""
    weight, x = sparse(1, 2**15 + 77, 0.9, torch.float16, 5), random(1, 2**15 + 77, dtype=torch.float16)
    packed = pack(weight)
    parts = (packed.mask.to(DEVICE), packed.values.to(DEVICE), packed.offsets.long().to(DEVICE))
    matrix = kernel.bind(PackedMatrix(*parts, packed.columns), None)
    assert matrix.starts.dtype == torch.int32 and int(matrix.starts[-1, -1]) > 2**14
    assert_close(multiply(kernel, matrix, x), x, weight, None)
    assert torch.equal(unpacked(kernel, matrix, 0, 1), weight)
    narrow = bound(kernel, weight[:, : 2**15 - 1].contiguous())
    assert narrow.starts.dtype == torch.int16 and torch.equal(narrow.starts.int(), matrix.starts[:, :512])


def test_tensors_at_odd_addresses(kernel: GpuKernel) -> None:
    """Use tensors at odd addresses, and check that the memory around them does not change."""
    weight, x = sparse(19, 90, 0.4, torch.bfloat16, 8), random(5, 90, dtype=torch.bfloat16)
    packed = pack(weight)
    parts = [part.to(DEVICE) for part in vars_of(packed)]
    mask, values, offsets = (torch.cat([part.flatten()[:1], part.flatten()])[1:].view(part.shape) for part in parts)
    matrix = kernel.bind(PackedMatrix(mask, values, offsets, 90), None)
    for tokens in (1, 5):
        memory = torch.full((3 + tokens * 19 + 3,), 7.0, dtype=torch.bfloat16, device=DEVICE)
        own = torch.cat([x[0, :1], x[:tokens].flatten()]).to(DEVICE)[1:].view(tokens, 90)
        kernel.linear(matrix, own, memory[3:-3].view(tokens, 19), tokens)
        assert_close(memory[3:-3].view(tokens, 19).cpu(), x[:tokens], weight, None)
        assert memory[:3].eq(7).all() and memory[-3:].eq(7).all()
    memory = torch.full((3 + 19 * 90 + 3,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    kernel.unpack(matrix, 0, memory[3:-3].view(19, 90))
    assert torch.equal(memory[3:-3].view(19, 90).cpu(), weight)
    assert memory[:3].eq(7).all() and memory[-3:].eq(7).all()


def vars_of(packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    return packed.mask, packed.values, packed.offsets


def test_inconsistent_matrices_are_rejected(kernel: GpuKernel) -> None:
    packed = pack(sparse(8, 40, 0.5, torch.bfloat16, 0))
    mask, values, offsets = (part.to(DEVICE) for part in vars_of(packed))
    spare, moved = mask.clone(), offsets.clone()
    spare[2, 1] |= -(2**31)
    moved[3] += 1
    bias = torch.zeros(8, dtype=torch.bfloat16, device=DEVICE)
    wider, more, further = (part.to(DEVICE) for part in vars_of(pack(sparse(8, 64, 0.5, torch.bfloat16, 0))))
    for wrong, bad_bias in (
        (PackedMatrix(wider, more, further, 40), None),  # consistent except for bits past the last column
        (PackedMatrix(spare, values, offsets, 40), None),
        (PackedMatrix(mask, values, moved, 40), None),
        (PackedMatrix(mask, values, offsets + 1, 40), None),
        (PackedMatrix(mask, values[:-1].clone(), offsets, 40), None),
        (PackedMatrix(mask, values, offsets[:-1].clone(), 40), None),
        (PackedMatrix(mask, values, offsets, 65), None),
        (PackedMatrix(mask, values.double(), offsets, 40), None),
        (PackedMatrix(mask.T, values, offsets, 40), None),
        (PackedMatrix(mask, values, offsets, 40), bias.float()),
        (PackedMatrix(mask, values, offsets, 40), bias[1:]),
    ):
        with pytest.raises(ValueError):
            kernel.bind(wrong, bad_bias)
    kernel.bind(PackedMatrix(mask, values, offsets, 40), bias)


@pytest.fixture
def layers(kernel: GpuKernel, monkeypatch: pytest.MonkeyPatch) -> tuple[PackedLinear, nn.Linear]:
    """Return a layer packed and dense that multiplies with the kernels."""
    if INTERPRETED:
        monkeypatch.setattr(linear, "find_kernel", lambda: kernel)
    dense = nn.Linear(70, 50).to(torch.float16).requires_grad_(False)
    dense.weight.data = sparse(50, 70, 0.3, torch.float16, 4)
    dense.bias.data = random(50, dtype=torch.float16)
    packed = PackedLinear(pack(dense.weight.data), dense.bias.data.clone())
    return packed.to(DEVICE), dense.to(DEVICE)


@pytest.mark.parametrize("shape", [(), (16,), (17,), (0,), (2, 1, 3)])
def test_layers(
    layers: tuple[PackedLinear, nn.Linear], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, dense = layers
    x = random(*shape, 70, dtype=torch.float16).to(DEVICE)
    for size in (2**21, 7 * 70 * 2):
        monkeypatch.setattr(linear, "_TILE_BYTES", size)
        monkeypatch.setattr(linear, "_GPU_TILE_BYTES", size)
        result = packed(x)
        assert result.shape == (*shape, 50)
        torch.testing.assert_close(result, dense(x), rtol=2e-3, atol=2e-3)
    assert isinstance(packed._current_binding().matrix, GpuMatrix)
    assert torch.equal(packed.to_dense(), dense.weight)


def test_noncontiguous_inputs(layers: tuple[PackedLinear, nn.Linear]) -> None:
    packed, dense = layers
    for x in (
        random(70, 5, dtype=torch.float16).T,
        random(4, 3, 140, dtype=torch.float16)[..., ::2],
        random(1, 70, dtype=torch.float16).expand(6, 70),
    ):
        torch.testing.assert_close(packed(x.to(DEVICE)), dense(x.to(DEVICE)), rtol=2e-3, atol=2e-3)


def test_gradients_autocast_and_other_dtypes_use_torch(layers: tuple[PackedLinear, nn.Linear]) -> None:
    packed, dense = layers
    x = random(3, 70, dtype=torch.float16).to(DEVICE).requires_grad_()
    packed(x).float().square().sum().backward()
    other = x.detach().requires_grad_()
    dense(other).float().square().sum().backward()
    assert x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad, rtol=5e-3, atol=5e-3)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert packed(other.detach()).dtype == dense(other.detach()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        packed(other.detach().double())
    with torch.no_grad():
        compiled: Any = torch.compile(packed, backend="eager")
        torch.testing.assert_close(compiled(other), dense(other), rtol=2e-3, atol=2e-3)


def test_a_model_matches_the_dense_one(
    kernel: GpuKernel, tiny_model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED:
        monkeypatch.setattr(linear, "find_kernel", lambda: kernel)
    model = tiny_model("llama", torch.float32)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
    few = ids[:1, :1].to(DEVICE)
    with torch.no_grad():
        expected = model.to(DEVICE)(few).logits
        assert alps.pack_linears(model.cpu()) > 0
        torch.testing.assert_close(model.to(DEVICE)(few).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_on_a_gpu() -> None:
    """Test the choice of a backend, a CUDA graph, the last GPU while another is current, and released memory."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert find_gpu_kernel(device) is not None and "Triton" in gpu.describe_gpu(find_gpu_kernel(device))
    weight = sparse(300, 500, 0.3, torch.bfloat16, 2)
    packed = PackedLinear(pack(weight)).to(device)
    for tokens in (1, 5, 40):
        x = random(tokens, 500, dtype=torch.bfloat16).to(device)
        eager = packed(x)
        assert_close(eager.cpu(), x.cpu(), weight, None)
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = packed(x)
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
        assert torch.equal(out, eager)


def test_the_cases_run_on_the_expected_device(tmp_path: Path) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from alps.inference import triton_kernels

    assert isinstance(triton_kernels.multiply_one, InterpretedFunction) == INTERPRETED
