"""Versions, machine and commit under which a figure was produced."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from alps.core.cpu_count import usable_cpus

_DISTRIBUTION = "alps-prune"


def provenance() -> dict[str, str]:
    """Return versions of alps, Python and libraries, the machine, and the commit of the source tree."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "alps": version(_DISTRIBUTION),
        **libraries,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {_cores()}, {torch.get_num_threads()} threads",
        "commit": commit(),
    }


@functools.cache
def commit() -> str:
    """Return the short hash of this project's commit, with `+` for uncommitted changes, or `unknown`.

    Computed once per process. An installed package has no commit, wherever it is installed.
    """
    root = source_tree(Path(__file__).resolve().parents[1])
    if root is None:
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def source_tree(package: Path) -> Path | None:
    """Return the root of the work tree of this project that holds a package as `src/alps`.

    Args:
        package: folder of the package.

    Returns:
        The root; None when the package is installed, or lies in the repository of another project.
    """
    root = package.parents[1]
    if package != root / "src" / "alps" or not (root / ".git").exists():
        return None
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return root if f'name = "{_DISTRIBUTION}"' in project else None


def _cores() -> str:
    """Return the number of cores, with those that this process may use if they are fewer."""
    cores, usable = os.cpu_count() or 1, usable_cpus()
    return f"{cores} cores" if usable >= cores else f"{usable} of {cores} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
