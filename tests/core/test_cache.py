"""The folder of the cache: by its own variable, by that of the desktop's standard, or in the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from alps.core.cache import cache_folder


def test_variables_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("ALPS_CACHE", "~/here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/home/ada/here")
    monkeypatch.setenv("ALPS_CACHE", "")
    assert cache_folder() == Path("/var/cache/alps")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/ada/.cache/alps")
