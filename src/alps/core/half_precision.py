"""Half precision: hardware support for it, and products in float32 on CPUs without.

Such a CPU converts both factors to float32, multiplies, and rounds the product once. Instructions for half precision do
the same: exact products of two halves, sums in float32, one rounding at the end. torch's own kernels take up to eight
times as long there as float32 (docs/explanation/half-precision.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ops = torch.ops.aten
# Entries of each factor that are converted to float32 at once.
_CHUNK_ENTRIES = 2**22
# Below about this many rows, columns or terms, converting the factors costs more than the product.
_MIN_SIDE = 20.0


def has_fast_bfloat16(device: torch.device) -> bool:
    """Check for bfloat16 matmul instructions of at least twice the rate of float32.

    On CPUs these are AVX-512 BF16 and AMX. The answer depends on the instruction set only, never on timings, so that
    equal machines compute equal bits.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private functions of torch; a version without them counts as a CPU without the instructions.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and bool(check()) for check in checks)


def has_fast_float16(device: torch.device) -> bool:
    """Check for float16 matmul kernels; on CPUs those of oneDNN, which need AVX-512 FP16 or AMX."""
    if device.type != "cpu":
        return device.type == "cuda"
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return check is not None and bool(check())


_FAST = {torch.bfloat16: has_fast_bfloat16, torch.float16: has_fast_float16}


@contextmanager
def half_matmul_in_float32(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Context in which half-precision products on a CPU without instructions for them are computed in float32.

    Does nothing on a GPU, for models in float32 or float64, and on CPUs with such instructions.

    Args:
        device: that the models run on.
        models: their parameters' dtypes decide.
    """
    dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
    slow = any(multiplies_by_float32(dtype, device) for dtype in dtypes)
    with Float32MatmulMode() if slow else nullcontext():
        yield


def multiplies_by_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Check if matrix products of a dtype are faster in float32 on a device."""
    fast = _FAST.get(dtype)
    return device.type == "cpu" and fast is not None and not fast(device)


class Float32MatmulMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that computes bfloat16 and float16 matmuls and attention on the CPU in float32.

    Forward and backward are both covered.
    """

    def __init__(self) -> None:
        """Create a mode; it is active as a context manager."""
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation of torch, in float32 when that is faster."""
        if func in _COMPOSED and _is_half(args[0]):
            # Without gradients torch dispatches these whole, and not the products inside them.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in _ATTENTION and _is_half(args[0]) and args[0].dtype in _ATTENTION[func]:
            return _attention(func, args, kwargs or {})
        upcast = _UPCAST.get(func)
        if upcast is not None and _is_half(args[0]):
            left, right = args[-2:]
            if _is_worth_upcasting(left.shape[-2], left.shape[-1], right.shape[-1]):
                return upcast(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.device.type == "cpu"


def _is_worth_upcasting(rows: int, terms: int, columns: int) -> bool:
    return min(rows, terms, columns) > 0 and 1 / rows + 1 / terms + 1 / columns < 1 / _MIN_SIDE


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return _addmm(None, left, right)


def _addmm(bias: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1])
    bias = None if bias is None else bias.expand_as(out)
    step = max(_CHUNK_ENTRIES // left.shape[1], 1)
    for top in range(0, len(out), step):
        rows = slice(top, top + step)
        left_rows = left[rows].float()
        for first in range(0, out.shape[1], step):
            columns = slice(first, first + step)
            right_columns = right[:, columns].float()
            if bias is None:
                out[rows, columns] = left_rows @ right_columns
            else:
                added = bias[rows, columns].float()
                out[rows, columns] = torch.addmm(added, left_rows, right_columns, beta=beta, alpha=alpha)
    return out


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return _baddbmm(None, left, right)


def _baddbmm(bias: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    bias = None if bias is None else bias.expand_as(out)
    for index in range(len(out)):
        added = None if bias is None else bias[index]
        out[index] = _addmm(added, left[index], right[index], beta=beta, alpha=alpha)
    return out


def _attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Compute fused attention or its gradients in float32, and round the results to the dtype of the queries."""
    results = func(*map(_to_float32, args), **{name: _to_float32(value) for name, value in kwargs.items()})
    if func is _ATTENTION_FORWARD:
        # torch keeps the logarithms of the softmax sums in float32.
        return results[0].to(args[0].dtype), results[1]
    return tuple(result.to(args[0].dtype) for result in results)


def _to_float32(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.dtype in _FAST else value


_UPCAST: dict[Any, Callable[..., Tensor]] = {
    _ops.mm.default: _mm,
    _ops.addmm.default: _addmm,
    _ops.bmm.default: _bmm,
    _ops.baddbmm.default: _baddbmm,
}


def _private_op(name: str) -> Any:
    """Look up a private ATen operation; None in a torch without it, whose own kernel is then used."""
    operation = getattr(_ops, name, None)
    return None if operation is None else operation.default


_ATTENTION_FORWARD = _private_op("_scaled_dot_product_flash_attention_for_cpu")
# torch's forward takes as long as float32 in bfloat16, up to twice as long in float16; its backward several times as
# long in both.
_ATTENTION = {
    _ATTENTION_FORWARD: (torch.float16,),
    _private_op("_scaled_dot_product_flash_attention_for_cpu_backward"): (torch.bfloat16, torch.float16),
}
_COMPOSED = {_ops.linear.default, _ops.matmul.default}
