"""Pruning methods: torch and statistics in, pruned matrices and records out. No files, no printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from alps.core.errors import ConfigError, check_choice
from alps.solvers.admm import EFFORTS
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


def get_method(name: str, refit: bool = False, effort: str = "normal") -> Method:
    """The method of that name with its published defaults, followed by a refit of its weights if asked.

    Args:
        name: one of `METHODS`.
        refit: optimal weights on the method's support.
        effort: one of `admm.EFFORTS`; for ALPS alone, whose penalty may grow more slowly.

    Raises:
        ConfigError: for a name or an effort that does not exist, or what the method does not know.
    """
    check_choice("Method", name, METHODS)
    method = METHODS[name]()
    check_choice("Effort", effort, EFFORTS)
    if effort != "normal":
        if not isinstance(method, Alps):
            raise ConfigError(
                f"Method '{name}' knows no --effort {effort}: use it with --method alps, or leave it out."
            )
        method = replace(method, admm=EFFORTS[effort])
    return Refitted(method) if refit else method


__all__ = ["EFFORTS", "METHODS", "Alps", "DSnoT", "Magnitude", "Method", "Refitted", "SparseGPT", "Wanda", "get_method"]
