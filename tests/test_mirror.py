"""Tests lie where a reader looks for them: those of a module under its name, helpers in `helpers`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_PACKAGE = _TESTS.parent / "src" / "alps"


def modules() -> Iterator[str]:
    """Yield the modules of the package as `solvers/alps`."""
    for path in sorted(_PACKAGE.glob("*/*.py")):
        if path.name != "__init__.py":
            yield f"{path.parent.name}/{path.stem}"


def imported_tests(source: str) -> list[str]:
    """List the names that a file imports from test modules or from a conftest, at any depth of nesting."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if any(part.startswith("test_") or part == "conftest" for part in name.split("."))]


@pytest.mark.parametrize("path", sorted(_TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(_TESTS)))
def test_nothing_is_imported_from_a_test(path: Path) -> None:
    assert imported_tests(path.read_text()) == []


def test_the_check_finds_imports_from_tests() -> None:
    source = (
        "import conftest\nfrom solvers.test_alps import solve\ndef f():\n    from solvers import test_pcg, helpers\n"
    )
    assert imported_tests(source) == ["conftest", "solvers.test_alps.solve", "solvers.test_pcg"]


def test_helpers_lie_in_one_folder() -> None:
    others = {path for path in _TESTS.rglob("*.py") if not path.name.startswith("test_") and path.name != "conftest.py"}
    assert {path.parent.name for path in others} == {"helpers", "wheel"}
