"""Actions after the import of another module: once, at the right time, and without a trace in the module."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alps.core.post_import import run_after_import

NAME = "imported_later"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """List to which a module in a folder of `sys.path` adds its name."""
    (tmp_path / f"{NAME}.py").write_text("CALLS = []\nCALLS.append('module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield []
    sys.modules.pop(NAME, None)


def test_the_action_follows_the_first_import(calls: list[str]) -> None:
    finders = list(sys.meta_path)
    run_after_import(NAME, lambda: calls.append(*sys.modules[NAME].CALLS))
    assert calls == [] and len(sys.meta_path) == len(finders) + 1
    assert importlib.import_module("colorsys") and calls == []
    module = importlib.import_module(NAME)
    assert calls == ["module"] and sys.meta_path == finders
    assert inspect.getsource(module).startswith("CALLS")
    assert module.__spec__ is not None and module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(module)
    assert calls == ["module"]


def test_a_module_that_is_imported_already_is_not_waited_for(calls: list[str]) -> None:
    importlib.import_module(NAME)
    finders = list(sys.meta_path)
    run_after_import(NAME, lambda: calls.append("at once"))
    assert calls == ["at once"] and sys.meta_path == finders


def test_a_module_that_does_not_exist_is_missing_as_before(calls: list[str]) -> None:
    run_after_import("exists_nowhere", lambda: calls.append("never"))
    with pytest.raises(ModuleNotFoundError, match="exists_nowhere"):
        importlib.import_module("exists_nowhere")
    assert calls == []
