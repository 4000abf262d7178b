"""NaN and infinity are refused by name, before hours of work on a model that holds them, and before it is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alps.core.errors import CheckpointError


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no entry is NaN or infinite, nor becomes so in `dtype`; reads the tensor once and needs no room."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both ends of a tensor with a NaN are NaN.
    ends = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(ends.to(dtype or tensor.dtype)).all())


def check_finite(tensors: Iterable[tuple[str, Tensor]], place: str, dtype: torch.dtype | None = None) -> None:
    """Refuse tensors with NaN or infinite entries.

    Args:
        tensors: by name, read one after the other.
        place: where they come from.
        dtype: what they will be cast to; None for nothing.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in tensors:
        if is_finite(tensor, dtype):
            continue
        if is_finite(tensor):
            word = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"Tensor {name} of '{place}' overflows {word}: use --dtype bfloat16 or float32.")
        raise CheckpointError(f"Tensor {name} of '{place}' holds NaN or infinite values: fetch or mend the checkpoint.")


def check_result(module: nn.Module, place: str) -> None:
    """Make sure before anything is written that all parameters of a result are finite.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta" and not is_finite(parameter):
            raise CheckpointError(
                f"Tensor {name} for '{place}' has become NaN or infinite and is not written: run with --dtype float32."
            )
