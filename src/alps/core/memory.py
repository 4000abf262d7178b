"""Peak memory of the process and its GPU, and clear errors when memory runs out."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from alps.core.errors import SolveFailed


@contextmanager
def out_of_memory_as_error(hint: str, host_hint: str | None = None) -> Iterator[None]:
    """Context that raises `SolveFailed` in place of an out-of-memory error of a GPU or of the host.

    Args:
        hint: settings that need less memory; the end of the message.
        host_hint: the same for memory of the host; None for `hint`.

    Raises:
        SolveFailed: when memory runs out; the message begins with the notes of the original error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
            raise
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        if isinstance(error, torch.OutOfMemoryError):
            reason = text.splitlines()[0].split(". ")[0].rstrip(".")[:120] if text else "the device is out of memory"
        else:
            reason, hint = "The host is out of memory", host_hint or hint
        raise SolveFailed(f"{where}{reason}: {hint}.") from error


def peak_host_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Return the largest amount of memory that torch has allocated on a GPU, in bytes; 0 for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peaks of this process (on Linux only) and of a GPU, so that the next run has figures of its own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
