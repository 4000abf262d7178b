"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alps.core.errors import CheckpointError


def check_target(out: Path, replaceable: str | None = None) -> None:
    """Make sure that a directory can be put at `out`, before hours of work; leaves nothing behind.

    Args:
        out: must not exist, or be an empty directory, or hold a file called `replaceable`.

    Raises:
        CheckpointError: when it is a file, is not empty, or cannot be created.
    """
    try:
        if out.is_symlink():
            raise CheckpointError(f"Output '{out}' is a symbolic link: give the directory itself.")
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"Output '{out}' is a file: give the name of a directory to create.")
        if out.is_dir() and any(out.iterdir()) and not (replaceable and (out / replaceable).is_file()):
            raise CheckpointError(f"Output directory '{out}' is not empty: give a new name or empty it first.")
        ancestor = next(parent for parent in out.absolute().parents if parent.exists())
        # Named as what `remove_partial` removes: a kill may fall in between.
        probe = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.partial-", dir=ancestor))
        try:
            (probe / out.name).mkdir()
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"Output directory '{out}' cannot be created ({error.strerror}): choose a place you can write to."
        ) from None


@contextmanager
def new_directory(out: Path, replaceable: str | None = None) -> Iterator[Path]:
    """Fill a temporary neighbour of `out`, then rename it into place; on any error it is removed.

    Args:
        out: see `check_target`.
        replaceable: a directory that holds a file of this name is replaced.

    Raises:
        CheckpointError: when the files cannot be written (a full disk, say).
    """
    check_target(out, replaceable)
    out = out.absolute()
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.partial-", dir=out.parent))
        yield partial
        # Temporary folders, and the files of some libraries, are private: what is published follows the umask.
        mask = umask()
        partial.chmod(0o777 & ~mask)
        for file in partial.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
            sync(file)
        if out.is_dir() and any(out.iterdir()):
            _swap(partial, out)
        else:
            partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise CheckpointError(f"Output directory '{out}' cannot be written: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def remove_partial(out: Path) -> None:
    """Remove what killed processes left of `out` half-written; no other process may be writing it."""
    for left in out.absolute().parent.glob(f".{glob.escape(out.name[:100])}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"'{path}' cannot be written: {error.strerror or error}.") from None


def _swap(new: Path, out: Path) -> None:
    """Put `new` in the place of the directory `out`, which comes back when that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.old-", dir=out.parent))
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """What the user takes away from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
