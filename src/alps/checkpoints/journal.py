"""What a run has done so far, block by block, in a directory beside the one that it will write.

    OUT.partial/journal.json               what the run is: settings, model, calibration; notes such as its budget
    OUT.partial/block-00012.safetensors    every tensor of a finished block, by its name inside the block
    OUT.partial/block-00012.json           the records of that block; written last: with it the block is done

Each file appears by a rename after its bytes are on the disk, so that a kill at any moment, or a full disk, leaves all
finished blocks and nothing else that counts.
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
from alps.checkpoints.safetensors_io import TensorOnDisk, TensorToWrite, stored_tensors, write_tensors
from alps.checkpoints.weight_files import weight_file
from alps.core.errors import CheckpointError

JOURNAL_NAME = "journal.json"
_FORMAT = 1
Facts = Mapping[str, str]


class Journal:
    """The finished blocks of one run.

    Attributes:
        place: the directory.
    """

    def __init__(self, place: Path, facts: Facts, notes: dict[str, Any]) -> None:
        self.place, self._facts, self._notes = place, dict(facts), notes
        self._known = 0

    @property
    def finished(self) -> int:
        """How many blocks are done, the first ones. Their files say so: a signal may fall just after one."""
        while self._path(self._known, "json").is_file():
            self._known += 1
        return self._known

    @property
    def holds_work(self) -> bool:
        """Whether anything would have to be done again without it: a finished block, or a note."""
        return bool(self.finished or self._notes)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What was noted of the whole run, as plain JSON values."""
        return self._notes

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value that is the run's, not a block's."""
        self._notes[key] = value
        self.save()

    def save(self) -> None:
        """Write what is known of the whole run."""
        content = {"format": _FORMAT, "facts": self._facts, "notes": self._notes}
        write_text(self.place / JOURNAL_NAME, json.dumps(content, indent=1))

    def keep_tensors(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what a block became; it is not done yet, and whichever process holds the tensors may do it.

        Args:
            index: of the block; the next one after those that are finished.
            tensors: by their names inside the block.

        Raises:
            CheckpointError: when they cannot be written.
        """
        assert index == self.finished, f"block {index} after {self.finished} finished ones"
        pending = [TensorToWrite(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]  # type: ignore[misc]
        write_tensors(self._path(index, "safetensors"), pending)

    def keep_record(self, index: int, record: Mapping[str, Any]) -> None:
        """Write what is to be known of a block whose tensors are on the disk, as plain JSON values: it is done.

        Raises:
            CheckpointError: when it cannot be written.
        """
        write_text(self._path(index, "json"), json.dumps(record, allow_nan=False))
        sync(self.place)

    def tensors(self, index: int) -> dict[str, TensorOnDisk]:
        """Where the tensors of a finished block lie, by their names inside the block.

        Raises:
            CheckpointError: when its file is damaged.
        """
        return {one.name: one for one in stored_tensors(weight_file(self._path(index, "safetensors")))}

    def record(self, index: int) -> dict[str, Any]:
        """The record of a finished block."""
        path = self._path(index, "json")
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise CheckpointError(f"'{path}' is damaged: delete '{self.place}' and start again.") from None
        return found

    def discard(self) -> None:
        """The run is over: what it kept is no longer needed."""
        gone = Path(tempfile.mkdtemp(prefix=f".{self.place.name[:108]}-old-", dir=self.place.parent))
        self.place.rename(gone / "journal")
        shutil.rmtree(gone, ignore_errors=True)

    def _path(self, index: int, suffix: str) -> Path:
        return self.place / f"block-{index:05}.{suffix}"


def journal_place(out: Path) -> Path:
    """Where the journal of a run lies that will write `out`."""
    return out.absolute().with_name(out.absolute().name + ".partial")


def check_journal(out: Path, facts: Facts, resume: bool) -> None:
    """Refuse early what `open_journal` would refuse, as far as `facts` are known yet; writes nothing."""
    place = journal_place(out)
    content = _read(place)
    if content is None:
        if resume:
            raise CheckpointError(f"Nothing is to be resumed: '{place}' holds no journal; leave --resume out.")
        return
    _check_same(place, content["facts"], facts)


@contextmanager
def open_journal(out: Path, facts: Facts) -> Iterator[Journal]:
    """The journal of a run, begun or gone on with; other processes are kept out for the time of the body.

    It stays when the body fails after a block was finished or something noted, and disappears when nothing was.

    Args:
        out: the directory that the run will write.
        facts: everything that the result depends on, by name.

    Raises:
        CheckpointError: when it is in use, is another run's, or cannot be written.
    """
    place = journal_place(out)
    with locked_directory(place, JOURNAL_NAME):
        content = _read(place)
        if content is not None:
            _check_same(place, content["facts"], facts)
        journal = Journal(place, facts, {} if content is None else content["notes"])
        journal.save()
        try:
            yield journal
        finally:
            if not journal.holds_work and place.is_dir():
                for path in (*place.glob("block-*"), place / JOURNAL_NAME):
                    path.unlink(missing_ok=True)


def follow_journal(out: Path) -> Journal:
    """The journal that another process has opened, to read it and to keep tensors in it.

    Raises:
        CheckpointError: when there is none: the processes do not see the same files.
    """
    place = journal_place(out)
    content = _read(place)
    if content is None:
        raise CheckpointError(f"'{place}' is not there for every process: give an OUT that all hosts share.")
    return Journal(place, content["facts"], content["notes"])


def _read(place: Path) -> dict[str, Any] | None:
    path = place / JOURNAL_NAME
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != _FORMAT or not isinstance(content["facts"], dict):
            raise ValueError
        content["notes"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"'{path}' is not a journal of this version: delete '{place}', or give another output directory."
        ) from None
    return content


def _check_same(place: Path, before: Facts, now: Facts) -> None:
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        words = ", ".join(f"{key} was {_short(before.get(key))} and is {_short(now[key])}" for key in changed)
        raise CheckpointError(
            f"'{place}' holds an unfinished run that differs from this one: {words}. "
            "Go on with that one's settings, delete the directory, or give another output directory."
        )


def _short(value: str | None) -> str:
    return "not set" if value is None else value if len(value) < 40 else f"{value[:12]}..."
