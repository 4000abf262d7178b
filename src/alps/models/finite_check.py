"""Checks for NaN and infinite values in the tensors of a model, before hours of work and before it is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alps.core.errors import CheckpointError
from alps.core.text_format import dtype_name


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Check that no entry is NaN or infinite, now or after a cast; allocates no memory of the tensor's size.

    Args:
        tensor: of any dtype and shape.
        dtype: to cast to; None for the tensor's own.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A NaN anywhere makes both extremes NaN.
    extremes = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(extremes.to(dtype or tensor.dtype)).all())


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str, dtype: torch.dtype | None = None) -> None:
    """Refuse tensors with NaN or infinite entries.

    Args:
        tensors: names and tensors, read one after the other.
        source: checkpoint or file that they come from, for the message.
        dtype: that they will be cast to; None for no cast.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in tensors:
        if is_finite(tensor, dtype):
            continue
        if dtype is not None and is_finite(tensor):
            raise CheckpointError(
                f"Tensor {name} of '{source}' overflows {dtype_name(dtype)}: use --dtype bfloat16 or float32."
            )
        raise CheckpointError(
            f"Tensor {name} of '{source}' holds NaN or infinite values: fetch the checkpoint again, or repair it."
        )


def check_result(module: nn.Module, destination: str) -> None:
    """Check that all parameters of a result are finite, before it is written.

    Args:
        module: the result; parameters on the meta device are skipped.
        destination: where it will be written, for the message.

    Raises:
        CheckpointError: naming the first parameter that is not finite.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta" and not is_finite(parameter):
            raise CheckpointError(
                f"Tensor {name} for '{destination}' has become NaN or infinite and is not written: "
                "run with --dtype float32."
            )
