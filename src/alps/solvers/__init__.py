"""Pruning methods: they take input statistics and weights, and return pruned weights and records.

The package reads no files and prints nothing. Its names are imported on first access, because help texts need the names
of the methods without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alps.core.statistics import InputStats, Needs
    from alps.solvers.admm import EFFORTS
    from alps.solvers.alps import Alps
    from alps.solvers.base import Method, Solution, SolveInfo
    from alps.solvers.dsnot import DSnoT
    from alps.solvers.magnitude import Magnitude
    from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
    from alps.solvers.refit import Refitted
    from alps.solvers.registry import METHODS, get_method
    from alps.solvers.sparsegpt import SparseGPT
    from alps.solvers.wanda import Wanda

__all__ = [
    "EFFORTS",
    "METHODS",
    "Alps",
    "DSnoT",
    "InputStats",
    "Magnitude",
    "Method",
    "Needs",
    "Pattern",
    "Refitted",
    "SemiStructured",
    "Solution",
    "SolveInfo",
    "SparseGPT",
    "Unstructured",
    "Wanda",
    "get_method",
    "keep_largest",
]

_MODULES = {
    "EFFORTS": "alps.solvers.admm",
    "METHODS": "alps.solvers.registry",
    "Alps": "alps.solvers.alps",
    "DSnoT": "alps.solvers.dsnot",
    "InputStats": "alps.core.statistics",
    "Magnitude": "alps.solvers.magnitude",
    "Method": "alps.solvers.base",
    "Needs": "alps.core.statistics",
    "Pattern": "alps.solvers.patterns",
    "Refitted": "alps.solvers.refit",
    "SemiStructured": "alps.solvers.patterns",
    "Solution": "alps.solvers.base",
    "SolveInfo": "alps.solvers.base",
    "SparseGPT": "alps.solvers.sparsegpt",
    "Unstructured": "alps.solvers.patterns",
    "Wanda": "alps.solvers.wanda",
    "get_method": "alps.solvers.registry",
    "keep_largest": "alps.solvers.patterns",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'alps.solvers' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
