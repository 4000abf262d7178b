"""Journal of a run: its finished blocks, in a directory next to the one that it will write.

    OUT.partial/journal.json               fingerprint (settings, model, calibration) and notes of the run
    OUT.partial/block-00012.safetensors    every tensor of a finished block, by its name inside the block
    OUT.partial/block-00012.json           record of that block; written last, which makes the block finished
    OUT.partial/files/                     files of the output other than weights, ready to be moved

Each file is renamed into place after its bytes are on the disk. A kill at any moment, or a full disk, therefore leaves
all finished blocks intact, and no file that looks finished and is not.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from alps.checkpoints.atomic_io import locked_directory, sync, write_text
from alps.checkpoints.safetensors_io import TensorOnDisk, TensorToWrite, list_tensors, write_tensors
from alps.checkpoints.weight_files import read_weight_file
from alps.core.errors import CheckpointError
from alps.core.json_text import to_json

JOURNAL_NAME = "journal.json"
_FORMAT = 1
Fingerprint = Mapping[str, str]


class Journal:
    """Finished blocks of one run.

    Attributes:
        directory: that holds the files.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint, notes: dict[str, Any]) -> None:
        """Describe a journal; nothing is read or written.

        Args:
            directory: that holds the files.
            fingerprint: everything that the result of the run depends on, by name.
            notes: on the whole run, as JSON values.
        """
        self.directory, self._fingerprint, self._notes = directory, dict(fingerprint), notes
        self._finished = 0

    @property
    def finished(self) -> int:
        """Number of finished blocks, which are the first ones; counted from their files."""
        # A signal can arrive between the write of a file and the count in memory, so that only files are believed.
        while self._path(self._finished, "json").is_file():
            self._finished += 1
        return self._finished

    @property
    def holds_work(self) -> bool:
        """True if a resumed run would save time: there is a finished block, or a note."""
        return bool(self.finished or self._notes)

    @property
    def notes(self) -> Mapping[str, Any]:
        """Notes on the whole run, as JSON values."""
        return self._notes

    def note(self, key: str, value: Any) -> None:
        """Save a JSON value that concerns the whole run."""
        self._notes[key] = value
        self.save()

    def save(self) -> None:
        """Write the fingerprint and the notes."""
        content = {"format": _FORMAT, "fingerprint": self._fingerprint, "notes": self._notes}
        write_text(self.directory / JOURNAL_NAME, to_json(content, indent=1))

    def save_tensors(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a pruned block; any rank that holds them may call this. It does not finish the block.

        Args:
            index: of the block, which must be the next one after the finished ones.
            tensors: by their names inside the block.

        Raises:
            CheckpointError: when they cannot be written.
        """
        assert index == self.finished, f"block {index} after {self.finished} finished ones"
        pending = [TensorToWrite(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]  # type: ignore[misc]
        write_tensors(self._path(index, "safetensors"), pending)

    def save_record(self, index: int, record: Mapping[str, Any]) -> None:
        """Write the record of a block whose tensors are on the disk, which finishes it.

        Args:
            index: of the block.
            record: JSON values.

        Raises:
            CheckpointError: when it cannot be written.
        """
        write_text(self._path(index, "json"), to_json(record))
        sync(self.directory)

    def tensors(self, index: int) -> dict[str, TensorOnDisk]:
        """Return the tensors of a finished block by their names inside the block, without reading their values.

        Raises:
            CheckpointError: when the file is damaged.
        """
        file = read_weight_file(self._path(index, "safetensors"))
        return {tensor.name: tensor for tensor in list_tensors(file)}

    def record(self, index: int) -> dict[str, Any]:
        """Return the record of a finished block.

        Raises:
            CheckpointError: when the file is damaged.
        """
        path = self._path(index, "json")
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise CheckpointError(f"'{path}' is damaged: delete '{self.directory}' and start again.") from None
        return record

    def discard(self) -> None:
        """Remove the journal at the end of the run."""
        folder = Path(tempfile.mkdtemp(prefix=f".{self.directory.name[:108]}-old-", dir=self.directory.parent))
        self.directory.rename(folder / "journal")
        shutil.rmtree(folder, ignore_errors=True)

    def _path(self, index: int, suffix: str) -> Path:
        return self.directory / f"block-{index:05}.{suffix}"


def journal_directory(out: Path) -> Path:
    """Return the directory of the journal of a run that will write `out`."""
    return out.absolute().with_name(out.absolute().name + ".partial")


def check_journal(out: Path, fingerprint: Fingerprint, resume: bool) -> None:
    """Refuse what `open_journal` would refuse, before the model is loaded; nothing is written.

    Args:
        out: directory that the run will write.
        fingerprint: the part of it that does not need the model.
        resume: the user expects a journal.

    Raises:
        CheckpointError: when the journal is another run's or damaged, or is expected and missing.
    """
    directory = journal_directory(out)
    content = _read(directory)
    if content is None:
        if resume:
            raise CheckpointError(f"There is nothing to resume: '{directory}' holds no journal; leave --resume out.")
        return
    _check_same(directory, content["fingerprint"], fingerprint)


@contextmanager
def open_journal(out: Path, fingerprint: Fingerprint) -> Iterator[Journal]:
    """Open or create the journal of a run as a context that locks it for this process.

    When the body fails, a journal that holds work stays, and an empty one is removed.

    Args:
        out: directory that the run will write.
        fingerprint: everything that the result depends on, by name.

    Raises:
        CheckpointError: when the journal is in use, is another run's, or cannot be written.
    """
    directory = journal_directory(out)
    with locked_directory(directory, JOURNAL_NAME):
        content = _read(directory)
        if content is not None:
            _check_same(directory, content["fingerprint"], fingerprint)
        journal = Journal(directory, fingerprint, {} if content is None else content["notes"])
        journal.save()
        try:
            yield journal
        finally:
            if not journal.holds_work and directory.is_dir():
                for path in (*directory.glob("block-*"), directory / JOURNAL_NAME):
                    path.unlink(missing_ok=True)


def follow_journal(out: Path) -> Journal:
    """Return the journal that another rank has opened, to read it and to save tensors in it.

    Raises:
        CheckpointError: when there is none, because the ranks do not share a file system.
    """
    directory = journal_directory(out)
    content = _read(directory)
    if content is None:
        raise CheckpointError(f"'{directory}' is not visible to every rank: give an OUT that all hosts share.")
    return Journal(directory, content["fingerprint"], content["notes"])


def _read(directory: Path) -> dict[str, Any] | None:
    path = directory / JOURNAL_NAME
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != _FORMAT or not isinstance(content["fingerprint"], dict):
            raise ValueError
        content["notes"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"'{path}' is not a journal of this version: delete '{directory}', or give another output directory."
        ) from None
    return content


def _check_same(directory: Path, before: Fingerprint, now: Fingerprint) -> None:
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        changes = ", ".join(f"{key} was {_short(before.get(key))} and is {_short(now[key])}" for key in changed)
        raise CheckpointError(
            f"'{directory}' holds an unfinished run that differs from this one: {changes}. "
            "Repeat its settings, delete the directory, or give another output directory."
        )


def _short(value: str | None) -> str:
    return "not set" if value is None else value if len(value) < 40 else f"{value[:12]}..."
