"""Table of the pruning methods by name."""

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
    """Create a method with its published defaults.

    Args:
        name: a key of `METHODS`.
        refit: follow the method by a refit of its weights on its support.
        effort: a key of `admm.EFFORTS`. `high` lets the penalty of ALPS grow more slowly; other methods only have
            `normal`.

    Raises:
        ConfigError: if the name or the effort does not exist, or the method does not have the effort.
    """
    check_choice("Method", name, METHODS)
    method = METHODS[name]()
    check_choice("Effort", effort, EFFORTS)
    if effort != "normal":
        if not isinstance(method, Alps):
            raise ConfigError(f"Method '{name}' has no --effort {effort}: use --method alps, or leave --effort out.")
        method = replace(method, admm=EFFORTS[effort])
    return Refitted(method) if refit else method
