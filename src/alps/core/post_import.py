"""Work that is done once another package has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def run_after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` now if a module has been imported, else directly after its first import.

    Until then a finder on `sys.meta_path` waits for the module. It loads nothing itself, and removes itself.

    Args:
        name: of the module.
        action: its errors are raised by the import of the module.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WaitingFinder(name, action))


class _WaitingFinder(MetaPathFinder):
    """Finder that finds one module as the others would, and adds an action to its execution."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name, self._action = name, action

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._action)
        return spec


class _ActingLoader(Loader):
    """Loader that executes a module as another loader does, then calls an action."""

    def __init__(self, loader: Loader, action: Callable[[], object]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its loader, to read its source, gets the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action()
