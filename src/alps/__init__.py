"""alps: one-shot pruning of large language models by optimisation."""

from importlib.metadata import version

from alps.api import prune
from alps.assessment import evaluate, evaluate_tasks
from alps.errors import AlpsError
from alps.loaded import load
from alps.solvers import METHODS, Alps, DSnoT, Magnitude, Refitted, SparseGPT, Wanda
from alps.solvers.pattern import SemiStructured, Unstructured

__version__ = version("alps-prune")

__all__ = [
    "METHODS",
    "Alps",
    "AlpsError",
    "DSnoT",
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
    "prune",
]
