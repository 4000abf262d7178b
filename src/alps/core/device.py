"""Devices, and the precision of float32 matrix products on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from alps.core.errors import ConfigError, first_line


def pick_device(name: str) -> torch.device:
    """Return the device of that name and check that it works.

    Args:
        name: a device of torch, or `auto` for the first GPU, else the CPU.

    Raises:
        ConfigError: when torch has no such device, or cannot compute on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device).sum())
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ConfigError(
            f"Device '{name}' cannot be used here ({first_line(error)}): choose auto, cpu or cuda:N."
        ) from None
    return device


def exact_float32() -> AbstractContextManager[None]:
    """Context in which float32 matrix products do not use TF32; the caller's settings are restored afterwards."""
    return _float32_products("highest", "ieee")


def bfloat16_factors() -> AbstractContextManager[None]:
    """Context in which a CPU rounds the factors of float32 matrix products to bfloat16, and sums in float32.

    Factors that are bfloat16 numbers already lose nothing: their products are exact in float32. Instructions for
    bfloat16 then take half the time.
    """
    return _float32_products("medium", "bf16")


@contextmanager
def _float32_products(precision: str, backend_precision: str) -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller has set torch's newer per-backend switches; then reading the older one raises.
        with _products_by_backend(backend_precision):
            yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _products_by_backend(precision: str) -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.mkldnn.matmul,)  # type: ignore[attr-defined]
    if precision == "ieee":
        backends = (torch.backends.cuda.matmul, *backends)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
