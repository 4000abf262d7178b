"""alps: one-shot pruning of large language models by optimisation."""

from importlib.metadata import version

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
