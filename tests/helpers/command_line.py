"""The command line run in the process of the test, and a list of the files that it wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alps.cli import main


def run_alps(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `alps` with these arguments in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["alps", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.run()
        sys.exit(0)
    return int(left.value.code or 0)


def contents(folder: Path) -> list[str]:
    """Return the relative paths of everything below a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
