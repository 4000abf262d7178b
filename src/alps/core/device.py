"""Device, seeds, exact float32 and memory: what a run asks of the machine it is on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from alps.core.errors import ConfigError, SolveFailed, first_line


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU that torch sees, else the CPU.

    Raises:
        ConfigError: for a device that does not exist here.
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


@contextmanager
def out_of_memory_as_error(advice: str, host: str | None = None) -> Iterator[None]:
    """Turn running out of memory, on a GPU or on the host, into one sentence.

    Args:
        advice: what needs less, as the sentence ends.
        host: the same where it is the host's memory that is short; None for the same words.

    Raises:
        SolveFailed: in place of torch's error; it keeps a site that was named on the way.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in words:
            raise
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        if isinstance(error, torch.OutOfMemoryError):
            reason = words.splitlines()[0].split(". ")[0].rstrip(".")[:120] if words else "the device is out of memory"
        else:
            reason, advice = "The host is out of memory", host or advice
        raise SolveFailed(f"{where}{reason}: {advice}.") from error


def derived_seed(seed: int, purpose: str) -> int:
    """A seed in [0, 2^63) for one of several independent random streams under the same `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 matrix products for the time of the body; TF32 settings of the caller come back afterwards."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller used torch's newer switches, after which the older one refuses to answer.
        with _exact_by_backend():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _exact_by_backend() -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def peak_host_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let the peaks below begin anew, so that several runs in one process can be told apart; on Linux and on GPUs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int:
    """Largest amount of memory that torch had allocated on a GPU, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def provenance() -> dict[str, str]:
    """Versions, machine and commit under which a figure was produced."""
    facts = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "alps": version("alps-prune"),
        **facts,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Commit of the source tree the package runs from, with `+` when it has changes; `unknown` elsewhere."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
