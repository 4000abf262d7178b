"""Text for sizes, durations and dtypes, as messages and tables show them."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def format_gib(nbytes: float, digits: int = 2) -> str:
    """Return a number of bytes in GiB, such as `1.25 GiB`."""
    return f"{nbytes / 2**30:.{digits}f} GiB"


def format_size(nbytes: float) -> str:
    """Return a number of bytes in GiB from 1 GiB on, else in MiB, such as `1.2 GiB` or `300 MiB`."""
    return format_gib(nbytes, 1) if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds below 2 minutes, in minutes below 2 hours, else in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_peak_memory(host_bytes: int, device_bytes: int, device: str) -> str:
    """Return the peak memory of a run, such as `1.25 GiB, 3.50 GiB on cuda:0`.

    Args:
        host_bytes: of the process.
        device_bytes: on the device; left out when 0.
        device: name of the device.
    """
    text = format_gib(host_bytes)
    return f"{text}, {format_gib(device_bytes)} on {device}" if device_bytes else text
