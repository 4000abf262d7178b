"""The direction of the imports, the size of the files, and what an import of the package may not touch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCE = Path(__file__).parent.parent / "src"
_LONGEST = 250
_STDLIB = sys.stdlib_module_names

# What a part may import beyond the standard library (allow), and what no file in it may import (deny).
_ALLOWED = {
    "alps.solvers": ("torch", "alps.stats", "alps.errors", "alps.solvers"),
    "alps.checkpoints": ("torch", "safetensors", "filelock", "zstandard", "alps.errors", "alps.checkpoints"),
    "alps.stats": ("torch",),
    "alps.errors": (),
}
_DENIED = {
    "alps.solvers": ("transformers", "datasets", "safetensors", "alps.models"),
    "alps.models": ("alps.solvers", "alps.api", "alps.walk"),
    "alps": ("alps.cli",),
}


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of everything a file imports, at any depth of nesting."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            # `from alps import cli` names a module, `from alps.errors import X` a member: both prefixes count.
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with a file, as sentences; empty when nothing is."""
    wrong = []
    for name in sorted(_imports(source, module, is_package)):
        for part, allowed in _ALLOWED.items():
            known = name.partition(".")[0] in _STDLIB or any(_inside(name, one) for one in allowed)
            if _inside(module, part) and not known:
                wrong.append(f"{module} imports {name}, which is not among what {part} may")
        for part, denied in _DENIED.items():
            if module != "alps.__main__" and _inside(module, part) and any(_inside(name, one) for one in denied):
                wrong.append(f"{module} imports {name}, which nothing in {part} may")
    if _inside(module, "alps.solvers"):
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        wrong += [f"{module} prints" for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    if (lines := len(source.splitlines())) > _LONGEST:
        wrong.append(f"{module} has {lines} lines, more than {_LONGEST}")
    return wrong


def _files() -> list[Path]:
    return sorted(_SOURCE.rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(_SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_sources_are_found() -> None:
    names = {_module(path) for path in _files()}
    assert {
        "alps",
        "alps.walk",
        "alps.solvers.alps",
        "alps.models.sites",
        "alps.checkpoints.directory",
    } <= names


@pytest.mark.parametrize("path", _files(), ids=_module)
def test_house_rules_hold(path: Path) -> None:
    assert violations(path.read_text(), _module(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("alps.solvers.bad", "import transformers", "imports transformers"),
        (
            "alps.solvers.bad",
            "def f():\n    from alps.models.sites import Site",
            "imports alps.models.sites.Site",
        ),
        ("alps.solvers.bad", "from ..models import sites", "imports alps.models.sites"),
        ("alps.solvers.bad", "from alps import walk", "imports alps.walk"),
        ("alps.solvers.bad", "import numpy as np", "imports numpy"),
        ("alps.solvers.bad", "def f(x):\n    print(x)", "prints"),
        ("alps.models.bad", "from alps.solvers import Alps", "imports alps.solvers.Alps"),
        ("alps.models.bad", "from alps import solvers", "imports alps.solvers"),
        ("alps.checkpoints.bad", "from transformers import AutoConfig", "imports transformers.AutoConfig"),
        ("alps.checkpoints.bad", "from .. import stats", "imports alps.stats"),
        ("alps.api", "from alps import cli", "imports alps.cli"),
        ("alps", "from .cli import app", "imports alps.cli.app"),
        ("alps.walk", "\n" * 251, "has 251 lines"),
    ],
)
def test_the_check_finds_what_is_forbidden(module: str, source: str, complaint: str) -> None:
    found = violations(source, module, is_package=module == "alps")
    assert any(complaint in sentence for sentence in found), found


def test_the_check_lets_pass_what_is_allowed() -> None:
    solver = "import math\nimport torch.linalg\nfrom alps.stats import Needs\nfrom . import base\nx.print(1)\n"
    assert violations(solver, "alps.solvers.good") == []
    assert violations("from alps.cli import app", "alps.__main__") == []
    assert violations("\n" * 250, "alps.walk") == []


_IMPORT_SCRIPT = """
import json, logging, sys
import torch
torch.set_float32_matmul_precision("medium")
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
handler = logging.NullHandler()
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(35)
seed = torch.initial_seed()
from alps import *
print(json.dumps({
    "precision": torch.get_float32_matmul_precision(),
    "dtype": str(torch.get_default_dtype()),
    "threads": torch.get_num_threads(),
    "handlers": logging.getLogger().handlers == [handler],
    "level": logging.getLogger().level,
    "seed": torch.initial_seed() == seed,
    "grad": torch.is_grad_enabled(),
    "cli": "alps.cli" in sys.modules,
}))
"""


def test_importing_the_package_leaves_global_settings_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT_SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "precision": "medium",
        "dtype": "torch.float64",
        "threads": 1,
        "handlers": True,
        "level": 35,
        "seed": True,
        "grad": True,
        "cli": False,
    }
    assert done.stderr == ""
