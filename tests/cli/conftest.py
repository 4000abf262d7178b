"""A text that every test of the command line calibrates on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One sentence, many times, in the test's own folder."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 400)
    return path
