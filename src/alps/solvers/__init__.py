"""Pruning methods: they take input statistics and weights, and return pruned weights and records.

The package reads no files and prints nothing. Its names are imported on first access, because help texts need the names
of the methods without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alps.solvers.admm import EFFORTS
    from alps.solvers.alps import Alps
    from alps.solvers.base import Method
    from alps.solvers.dsnot import DSnoT
    from alps.solvers.magnitude import Magnitude
    from alps.solvers.refit import Refitted
    from alps.solvers.registry import METHODS, get_method
    from alps.solvers.sparsegpt import SparseGPT
    from alps.solvers.wanda import Wanda

__all__ = ["EFFORTS", "METHODS", "Alps", "DSnoT", "Magnitude", "Method", "Refitted", "SparseGPT", "Wanda", "get_method"]

_MODULES = {
    "EFFORTS": "admm",
    "METHODS": "registry",
    "Alps": "alps",
    "DSnoT": "dsnot",
    "Magnitude": "magnitude",
    "Method": "base",
    "Refitted": "refit",
    "SparseGPT": "sparsegpt",
    "Wanda": "wanda",
    "get_method": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'alps.solvers' has no attribute '{name}'")
    return getattr(import_module(f"alps.solvers.{_MODULES[name]}"), name)
