"""Device, seeds, exact float32 and memory: what a run asks of the machine it is on."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from alps.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU that torch sees, else the CPU.

    Raises:
        ConfigError: for a device that does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Device '{name}' cannot be used here ({reason}): choose auto, cpu or cuda:N.") from None
    return device


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 matrix products for the time of the body; TF32 settings of the caller come back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_host_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Largest amount of memory that torch had allocated on a GPU, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def provenance() -> dict[str, str]:
    """Versions, machine and commit under which a figure was produced."""
    import alps

    facts = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "alps": alps.__version__,
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
