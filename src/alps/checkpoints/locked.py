"""Directories that grow by whole files, one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from alps.core.errors import CheckpointError


@contextmanager
def locked_directory(out: Path, marker: str) -> Iterator[None]:
    """Keep other processes out of a directory for the time of the body.

    The directory is created; without the file `marker` after the body it disappears again, unless it holds more, and so
    do those above it that were made for it. What an earlier kill left half-written is removed.

    Args:
        out: does not exist, is empty, or holds a file called `marker`.
        marker: says that the directory is what it is taken for.

    Raises:
        CheckpointError: when it holds something else, is in use, or cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"Output '{out}' is a file: give the name of a directory.")
        if out.is_dir() and any(p.name[0] != "." for p in out.iterdir()) and not (out / marker).exists():
            raise CheckpointError(f"Output directory '{out}' holds something else: give a new name or empty it first.")
        made = [folder for folder in out.absolute().parents if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise CheckpointError(
            f"Another process is at work in '{out}': wait for it, or give another directory."
        ) from None
    except OSError as error:
        raise CheckpointError(f"Output directory '{out}' cannot be used: {error.strerror or error}.") from None
    try:
        for partial in out.glob(".*.partial-*"):
            partial.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
        if not (out / marker).exists():
            (out / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                for folder in (out, *made):
                    folder.rmdir()
