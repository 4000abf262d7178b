"""The report documents exactly the phases that the code records, and its summary counts the layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from alps.reporting.run_report import INSIDE_SOLVE, PHASES
from alps.reporting.shrink_report import SHRINK_PHASES

_PACKAGE = Path(__file__).parents[2] / "src" / "alps"


def recorded_phases(source: str) -> Iterator[str]:
    """Phases whose seconds a module adds: first arguments of the calls that time or add."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        phase = node.args[0]
        adds = node.func.attr in ("add", "with_seconds") and len(node.args) == 2
        if (
            (adds or node.func.attr in ("measure", "timed"))
            and isinstance(phase, ast.Constant)
            and isinstance(phase.value, str)
        ):
            yield phase.value


def test_documented_phases_are_those_that_are_recorded() -> None:
    inside, outside = set[str](), set[str]()
    for path in _PACKAGE.rglob("*.py"):
        phases = inside if path.parent.name == "solvers" else outside
        phases.update(recorded_phases(path.read_text()))
    assert inside == set(INSIDE_SOLVE) and outside == set(PHASES) | (outside & set(SHRINK_PHASES))
    assert "cut" in outside - set(PHASES)
    assert inside.isdisjoint(outside) and "total" not in inside | outside


def test_recorded_phases_are_found() -> None:
    source = "with timer.measure('a'), info.timed('b'):\n    x.add('c', 1.0)\nr.with_seconds('d', s)\nnames.add('e')"
    assert set(recorded_phases(source)) == {"a", "b", "c", "d"}
