"""alps: one-shot pruning of large language models by optimisation."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from alps.core.post_import import run_after_import

if TYPE_CHECKING:
    from alps.core.errors import AlpsError
    from alps.data.loaded_model import LoadedModel, load
    from alps.evaluation.api import compare, evaluate, evaluate_tasks
    from alps.evaluation.inspect import inspect
    from alps.finetuning.api import distill, reconstruct
    from alps.finetuning.kept_zeros import KeptZeros, keep_zeros
    from alps.inference.api import pack, unpack
    from alps.inference.convert import pack_linears
    from alps.pruning.api import prune
    from alps.pruning.shrink_api import shrink
    from alps.solvers import METHODS, Alps, DSnoT, Magnitude, Refitted, SparseGPT, Wanda
    from alps.solvers.patterns import SemiStructured, Unstructured

__version__ = version("alps-prune")

__all__ = [
    "METHODS",
    "Alps",
    "AlpsError",
    "DSnoT",
    "KeptZeros",
    "LoadedModel",
    "Magnitude",
    "Refitted",
    "SemiStructured",
    "SparseGPT",
    "Unstructured",
    "Wanda",
    "__version__",
    "compare",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "keep_zeros",
    "load",
    "pack",
    "pack_linears",
    "prune",
    "reconstruct",
    "shrink",
    "unpack",
]

# The module of each name, imported on first access: `alps --help` needs neither torch nor transformers.
_LAZY_EXPORTS = {
    "METHODS": "alps.solvers",
    "Alps": "alps.solvers",
    "AlpsError": "alps.core.errors",
    "DSnoT": "alps.solvers",
    "KeptZeros": "alps.finetuning.kept_zeros",
    "LoadedModel": "alps.data.loaded_model",
    "Magnitude": "alps.solvers",
    "Refitted": "alps.solvers",
    "SemiStructured": "alps.solvers.patterns",
    "SparseGPT": "alps.solvers",
    "Unstructured": "alps.solvers.patterns",
    "Wanda": "alps.solvers",
    "compare": "alps.evaluation.api",
    "distill": "alps.finetuning.api",
    "evaluate": "alps.evaluation.api",
    "evaluate_tasks": "alps.evaluation.api",
    "inspect": "alps.evaluation.inspect",
    "keep_zeros": "alps.finetuning.kept_zeros",
    "load": "alps.data.loaded_model",
    "pack": "alps.inference.api",
    "pack_linears": "alps.inference.convert",
    "prune": "alps.pruning.api",
    "reconstruct": "alps.finetuning.api",
    "shrink": "alps.pruning.shrink_api",
    "unpack": "alps.inference.api",
}


# The one effect of importing alps: with it, `from_pretrained` of transformers reads packed directories. Nothing is
# imported for this before transformers is.
run_after_import("transformers.quantizers.auto", lambda: import_module("alps.inference.transformers_quantizer"))


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'alps' has no attribute '{name}'")
    return getattr(import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
