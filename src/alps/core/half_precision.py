"""Half precision on CPUs without instructions for it: products are computed in float32 and rounded once.

That is also what such instructions do: exact products of two halves, sums in float32, one rounding at the end. torch's
own way takes up to eight times float32's time there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alps.core.matmul_precision import has_fast_bfloat16, has_fast_float16

_ops = torch.ops.aten
_FAST = {torch.bfloat16: has_fast_bfloat16, torch.float16: has_fast_float16}
# Entries that are held in float32 at once of each factor.
_ENTRIES = 2**22
# With the fewest rows, columns or terms below about this, converting the factors costs more than the product.
_FEWEST = 20.0


@contextmanager
def half_matmul_in_float32(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """For the time of the body, multiply matrices of the models' dtypes in the fastest way that rounds as it should.

    Does nothing on a GPU, for float32 and float64, and where the CPU has instructions of its own.
    """
    dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
    slow = any(multiplies_by_float32(dtype, device) for dtype in dtypes)
    with Float32MatmulMode() if slow else nullcontext():
        yield


def multiplies_by_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of matrices of that dtype are faster by float32 on that device."""
    fast = _FAST.get(dtype)
    return device.type == "cpu" and fast is not None and not fast(device)


class Float32MatmulMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of bfloat16 or float16 matrices on the CPU go by float32, forward and backward; so does attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of every operation."""
        if func in _COMPOSED and _is_half(args[0]):
            # Without gradients torch asks for these whole, and would not ask again for their parts.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in _ATTENTION and _is_half(args[0]) and args[0].dtype in _ATTENTION[func]:
            return _attention(func, args, kwargs or {})
        wide = _WIDE.get(func)
        if wide is not None and _is_half(args[0]):
            left, right = args[-2:]
            if _pays(left.shape[-2], left.shape[-1], right.shape[-1]):
                return wide(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.device.type == "cpu"


def _pays(rows: int, terms: int, columns: int) -> bool:
    fewest = min(rows, terms, columns)
    return fewest > 0 and 1 / rows + 1 / terms + 1 / columns < 1 / _FEWEST


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return _addmm(None, left, right)


def _addmm(bias: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1])
    bias = None if bias is None else bias.expand_as(out)
    step = max(_ENTRIES // left.shape[1], 1)
    for top in range(0, len(out), step):
        rows = slice(top, top + step)
        factor = left[rows].float()
        for first in range(0, out.shape[1], step):
            columns = slice(first, first + step)
            other = right[:, columns].float()
            if bias is None:
                out[rows, columns] = factor @ other
            else:
                out[rows, columns] = torch.addmm(bias[rows, columns].float(), factor, other, beta=beta, alpha=alpha)
    return out


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return _baddbmm(None, left, right)


def _baddbmm(bias: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    bias = None if bias is None else bias.expand_as(out)
    for place in range(len(out)):
        part = None if bias is None else bias[place]
        out[place] = _addmm(part, left[place], right[place], beta=beta, alpha=alpha)
    return out


def _attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Fused attention or its gradients: every factor in float32, and what has the dtype of the queries rounded."""
    found = func(*map(_full, args), **{name: _full(value) for name, value in kwargs.items()})
    if func is _ATTENDS:
        # The logarithms of its sums stay in float32, as torch has them.
        return found[0].to(args[0].dtype), found[1]
    return tuple(one.to(args[0].dtype) for one in found)


def _full(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.dtype in _FAST else value


_WIDE: dict[Any, Callable[..., Tensor]] = {
    _ops.mm.default: _mm,
    _ops.addmm.default: _addmm,
    _ops.bmm.default: _bmm,
    _ops.baddbmm.default: _baddbmm,
}


def _internal(name: str) -> Any:
    """An operation that is torch's own affair; None in a release without it, which then goes its own way."""
    found = getattr(_ops, name, None)
    return None if found is None else found.default


_ATTENDS = _internal("_scaled_dot_product_flash_attention_for_cpu")
# torch's forward takes float32's time in bfloat16, up to twice that in float16; backward both take several times it.
_ATTENTION = {
    _ATTENDS: (torch.float16,),
    _internal("_scaled_dot_product_flash_attention_for_cpu_backward"): (torch.bfloat16, torch.float16),
}
_COMPOSED = {_ops.linear.default, _ops.matmul.default}
