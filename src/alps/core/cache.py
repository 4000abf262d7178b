"""Folder of everything that is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $ALPS_CACHE, else `alps` in the user's cache folder; it need not exist."""
    if folder := os.environ.get("ALPS_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alps"
