"""The direction of the imports, the size of the files, and what an import of the package may not touch."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import alps

_SOURCE = Path(__file__).parent.parent / "src"
_PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "architecture.md"
_LONGEST = 500
_STDLIB = sys.stdlib_module_names

# The packages from bottom to top. A module imports from its own package and from those before it.
_FLOORS = (
    "core",
    "solvers",
    "checkpoints",
    "models",
    "calibration",
    "inference",
    "data",
    "reporting",
    "finetuning",
    "pruning",
    "evaluation",
    "cli",
)

# Third-party packages that a package may reach, through any chain of imports.
_REACHABLE = {
    "core": {"torch", "pydantic", "yaml", "rich"},
    "solvers": {"torch"},
    "checkpoints": {"torch", "safetensors", "filelock", "zstandard", "pydantic"},
}


def imported_names(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of everything a file imports, at any depth of nesting."""
    package = module if is_package else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            # `from alps.cli import main` names a module, `from alps.core.errors import X` a member.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str | None:
    """Name of the package below `alps`, None for `alps` itself and for `alps.__main__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "alps" and parts[1] != "__main__" else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the house rules that one file breaks, as sentences."""
    wrong = []
    package = package_of(module)
    for name in sorted(imported_names(source, module, is_package)):
        target = package_of(name) if name.partition(".")[0] == "alps" else None
        if package is None or target not in _FLOORS:
            continue
        if _FLOORS.index(target) > _FLOORS.index(package):
            wrong.append(f"{module} imports {name}, which is above it")
    if package == "solvers":
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        wrong += [f"{module} prints" for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    if (lines := len(source.splitlines())) > _LONGEST:
        wrong.append(f"{module} has {lines} lines, more than {_LONGEST}")
    return wrong


def walls_broken(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """List the third-party packages that modules reach, through any chain of imports, and must not.

    Args:
        sources: text of every module by name.
        packages: names of the modules that are packages.
    """
    direct = {name: imported_names(text, name, name in packages) for name, text in sources.items()}
    edges = {name: {_module_of(one, sources) for one in names} - {None, name} for name, names in direct.items()}
    outside = {
        name: {top for one in names if (top := one.partition(".")[0]) not in _STDLIB and top not in ("alps", "")}
        for name, names in direct.items()
    }
    wrong = []
    for name in sorted(sources):
        allowed = _REACHABLE.get(package_of(name) or "")
        if allowed is None:
            continue
        for reached in sorted(_closure(name, edges), key=str):
            wrong += [f"{name} reaches {top} through {reached}" for top in sorted(outside[reached] - allowed)]
    return wrong


def _module_of(name: str, sources: Mapping[str, str]) -> str | None:
    if name in sources:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in sources else None


def _closure(name: str, edges: Mapping[str, set[str | None]]) -> set[str]:
    reached, pending = set[str](), [name]
    while pending:
        current = pending.pop()
        if current not in reached:
            reached.add(current)
            pending += [one for one in edges[current] if one is not None]
    return reached


@functools.cache
def _files() -> list[Path]:
    return sorted(_SOURCE.rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(_SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_packages_are_those_of_the_plan() -> None:
    entries = {path.name for path in (_SOURCE / "alps").iterdir() if path.name != "__pycache__"}
    assert entries - {"__init__.py", "__main__.py", "py.typed"} == set(_FLOORS)


def test_the_page_on_architecture_names_every_package_and_existing_files() -> None:
    page = _PAGE.read_text()
    diagram = page.split("```mermaid")[1].split("```")[0]
    assert re.findall(r"^ +(\w+)\[", diagram, re.MULTILINE) == list(reversed(_FLOORS))
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(_FLOORS)
    assert {name: set(allowed.split(", ")) for name, allowed in rows if allowed != "any"} == _REACHABLE
    journey = page.split("## The journey of a weight")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", journey, re.MULTILINE)
    assert 0 < len(files) == len(set(files)) <= 15
    assert [name for name in files if not (_SOURCE / "alps" / name).is_file()] == []


@pytest.mark.parametrize("path", _files(), ids=_module)
def test_house_rules_hold(path: Path) -> None:
    assert violations(path.read_text(), _module(path), path.name == "__init__.py") == []


def test_no_package_reaches_what_it_must_not() -> None:
    sources = {_module(path): path.read_text() for path in _files()}
    assert walls_broken(sources, frozenset(_module(path) for path in _files() if path.name == "__init__.py")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("alps.solvers.bad", "def f():\n    from alps.models.sites import Site", "imports alps.models.sites.Site"),
        ("alps.solvers.bad", "from ..models import sites", "imports alps.models.sites"),
        ("alps.solvers.bad", "from alps import pruning", "imports alps.pruning"),
        ("alps.solvers.bad", "def f(x):\n    print(x)", "prints"),
        ("alps.core.bad", "import alps.solvers.alps", "imports alps.solvers.alps"),
        ("alps.models.bad", "from alps import calibration", "imports alps.calibration"),
        ("alps.checkpoints.bad", "from .. import models", "imports alps.models"),
        ("alps.pruning.api", "from alps.cli import main", "imports alps.cli.main"),
        ("alps.pruning.pipeline", "\n" * 501, "has 501 lines"),
    ],
)
def test_the_check_finds_what_is_forbidden(module: str, source: str, complaint: str) -> None:
    found = violations(source, module)
    assert any(complaint in sentence for sentence in found), found


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"alps.solvers.bad": "import transformers"}, "alps.solvers.bad reaches transformers"),
        ({"alps.solvers.bad": "import numpy as np"}, "alps.solvers.bad reaches numpy"),
        ({"alps.checkpoints.bad": "from transformers import AutoConfig"}, "reaches transformers"),
        (
            {
                "alps.solvers.bad": "from alps.core import one",
                "alps.core.one": "from alps.core.two import x",
                "alps.core.two": "def f():\n    import yaml",
            },
            "alps.solvers.bad reaches yaml through alps.core.two",
        ),
    ],
)
def test_walls_are_transitive(sources: dict[str, str], complaint: str) -> None:
    found = walls_broken(sources)
    assert any(complaint in sentence for sentence in found), found


def test_the_check_lets_pass_what_is_allowed() -> None:
    solver = (
        "import math\nimport torch.linalg\nfrom alps.core.statistics import Needs\nfrom . import base\nx.print(1)\n"
    )
    assert violations(solver, "alps.solvers.good") == []
    assert walls_broken({"alps.solvers.good": solver, "alps.core.statistics": "import torch"}) == []
    assert violations("from alps.cli.main import app", "alps.__main__") == []
    assert violations("\n" * 500, "alps.pruning.pipeline") == []


def test_the_package_is_typed_and_its_typed_consumer_uses_every_public_name() -> None:
    """`.ci/check-wheel` checks the consumer against the installed wheel."""
    assert (_SOURCE / "alps" / "py.typed").read_text() == ""
    consumer = ast.parse((_SOURCE.parent / "tests" / "wheel" / "consumer.py").read_text())
    attributes = [node for node in ast.walk(consumer) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "alps"}
    assert used == set(alps.__all__)


# First parts of the names of variables of OpenMP's runtimes.
_OPENMP = {"OMP", "GOMP", "KMP", "MKL"}

_IMPORT_SCRIPT = """
import json, logging, os, sys
environment = dict(os.environ)
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
    "environment": environment == dict(os.environ),
}))
"""


def test_importing_the_package_leaves_global_settings_alone() -> None:
    # Without the settings of the tests, which the library must not make either.
    environment = {name: value for name, value in os.environ.items() if name.partition("_")[0] not in _OPENMP}
    command = [sys.executable, "-c", _IMPORT_SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "precision": "medium",
        "dtype": "torch.float64",
        "threads": 1,
        "handlers": True,
        "level": 35,
        "seed": True,
        "grad": True,
        "cli": False,
        "environment": True,
    }
    assert done.stderr == ""
