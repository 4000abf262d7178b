"""alps: one-shot pruning of large language models by optimisation."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alps.api import prune
    from alps.assessment import evaluate, evaluate_tasks
    from alps.errors import AlpsError
    from alps.inference.load import load
    from alps.inference.replace import pack_linears
    from alps.loaded import Loaded
    from alps.solvers import METHODS, Alps, DSnoT, Magnitude, Refitted, SparseGPT, Wanda
    from alps.solvers.pattern import SemiStructured, Unstructured

__version__ = version("alps-prune")

__all__ = [
    "METHODS",
    "Alps",
    "AlpsError",
    "DSnoT",
    "Loaded",
    "Magnitude",
    "Refitted",
    "SemiStructured",
    "SparseGPT",
    "Unstructured",
    "Wanda",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "load",
    "pack_linears",
    "prune",
]

# Where each name lives. It is imported when it is asked for: `alps --help` does without torch and transformers.
_HOMES = {
    "METHODS": "alps.solvers",
    "Alps": "alps.solvers",
    "AlpsError": "alps.errors",
    "DSnoT": "alps.solvers",
    "Loaded": "alps.loaded",
    "Magnitude": "alps.solvers",
    "Refitted": "alps.solvers",
    "SemiStructured": "alps.solvers.pattern",
    "SparseGPT": "alps.solvers",
    "Unstructured": "alps.solvers.pattern",
    "Wanda": "alps.solvers",
    "evaluate": "alps.assessment",
    "evaluate_tasks": "alps.assessment",
    "load": "alps.inference.load",
    "pack_linears": "alps.inference.replace",
    "prune": "alps.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alps' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
