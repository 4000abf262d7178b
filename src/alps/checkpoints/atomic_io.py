"""Directories and files that appear whole or not at all, and directories locked by one process."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from alps.core.errors import CheckpointError
from alps.core.text_format import format_size


def check_target(out: Path, replaceable: str | None = None) -> None:
    """Check before hours of work that a directory can be created at `out`; nothing is left behind.

    Args:
        out: a path that does not exist, an empty directory, or one that holds a file called `replaceable`.
        replaceable: name of that file; None to refuse every directory that is not empty.

    Raises:
        CheckpointError: when `out` is a file, is not empty, or cannot be created.
    """
    try:
        if out.is_symlink():
            raise CheckpointError(f"Output '{out}' is a symbolic link: give the directory itself.")
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"Output '{out}' is a file: give the name of a directory to create.")
        if out.is_dir() and any(out.iterdir()) and not (replaceable and (out / replaceable).is_file()):
            raise CheckpointError(f"Output directory '{out}' is not empty: give a new name or empty it first.")
        ancestor = next(parent for parent in out.absolute().parents if parent.exists())
        # If a kill leaves the probe behind, `remove_partial` finds it by this name.
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
    """Yield a temporary directory next to `out`, which is renamed to `out` on success and removed on any error.

    Args:
        out: directory to create; see `check_target`.
        replaceable: a directory at `out` that holds a file of this name is replaced.

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
        # mkdtemp and some libraries create private files: set the permissions that the umask would give.
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


@contextmanager
def temporary_directory(out: Path) -> Iterator[Path]:
    """Context of a temporary directory next to `out`, removed at the end; its files can be renamed into `out`.

    Raises:
        CheckpointError: when it cannot be made.
    """
    out, folder = out.absolute(), None
    try:
        new_parents = [parent for parent in out.parents if not parent.exists()]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.partial-", dir=out.parent))
        except OSError as error:
            raise CheckpointError(f"Output directory '{out}' cannot be written: {error.strerror or error}.") from None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in new_parents:
                parent.rmdir()


@contextmanager
def fresh_directory(folder: Path) -> Iterator[Path]:
    """Context of an empty directory with a fixed name, removed at the end; what a killed process left in it goes first.

    Raises:
        CheckpointError: when it cannot be made.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"'{folder}' cannot be written: {error.strerror or error}.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_files(source: Path, folder: Path) -> None:
    """Move everything in a directory to another one of the same disk."""
    for path in source.iterdir():
        path.rename(folder / path.name)


def check_space(out: Path, nbytes: int) -> None:
    """Check that the disk of a directory to be written has room.

    Args:
        out: directory that will be written.
        nbytes: that will be written in it and next to it.

    Raises:
        CheckpointError: with the sizes.
    """
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    usage = shutil.disk_usage(folder)
    # Some file systems report no size at all.
    if usage.total and usage.free < nbytes:
        raise CheckpointError(
            f"Output directory '{out}' needs {format_size(nbytes)}, and its disk has {format_size(usage.free)} left: "
            "free some space, or choose another place."
        )


def remove_partial(out: Path) -> None:
    """Remove the temporary directories that killed processes left next to `out`; no other process may be writing it."""
    for leftover in out.absolute().parent.glob(f".{glob.escape(out.name[:100])}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked_directory(out: Path, marker: str) -> Iterator[None]:
    """Context in which no other process can lock the same directory.

    The directory is created. Without a file called `marker` at the end it is removed with the parents that were created
    for it, unless it holds other files. Partial files of killed processes are removed at the start.

    Args:
        out: a path that does not exist, an empty directory, or one that holds a file called `marker`.
        marker: name of the file that identifies the kind of directory.

    Raises:
        CheckpointError: when the directory holds something else, is in use, or cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"Output '{out}' is a file: give the name of a directory.")
        if out.is_dir() and any(p.name[0] != "." for p in out.iterdir()) and not (out / marker).exists():
            raise CheckpointError(f"Output directory '{out}' holds something else: give a new name or empty it first.")
        new_parents = [folder for folder in out.absolute().parents if not folder.exists()]
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
                for folder in (out, *new_parents):
                    folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

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


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """Return the permission bits that the user denies to new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(new: Path, out: Path) -> None:
    """Replace the directory `out` by `new`; on failure the old one is restored."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.old-", dir=out.parent))
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
