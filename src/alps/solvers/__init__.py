"""Pruning methods: torch and statistics in, pruned matrices and records out. No files, no printing."""

from __future__ import annotations

from collections.abc import Callable

from alps.errors import ConfigError, did_you_mean
from alps.solvers.alps import Alps
from alps.solvers.base import Method
from alps.solvers.dsnot import DSnoT
from alps.solvers.magnitude import Magnitude
from alps.solvers.refit import Refitted
from alps.solvers.sparsegpt import SparseGPT
from alps.solvers.wanda import Wanda

METHODS: dict[str, Callable[[], Method]] = {
    "alps": Alps,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "dsnot": DSnoT,
    "dsnot-sparsegpt": lambda: DSnoT(initial="sparsegpt"),
}


def get_method(name: str, refit: bool = False) -> Method:
    """The method of that name with its published defaults, followed by a refit of its weights if asked.

    Raises:
        ConfigError: for a name that is not in `METHODS`.
    """
    if name not in METHODS:
        raise ConfigError(
            f"Method '{name}' is unknown: choose one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    method = METHODS[name]()
    return Refitted(method) if refit else method


__all__ = ["METHODS", "Alps", "DSnoT", "Magnitude", "Method", "Refitted", "SparseGPT", "Wanda", "get_method"]
