"""Journal of a run as a context of all its ranks, errors that say how much of the run is kept, and files set aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alps.checkpoints.atomic_io import remove_partial
from alps.checkpoints.journal import Journal, follow_journal, open_journal
from alps.core.distributed import ProcessGroup
from alps.core.errors import AlpsError
from alps.models.save import DirectoryWriter, staged_side_files

_LOG = logging.getLogger("alps")


@contextmanager
def journaled_run(out: Path, fingerprint: Mapping[str, str], group: ProcessGroup, first_step: str) -> Iterator[Journal]:
    """Context of a run's journal, which says where a run resumes, and is removed at the end of a run that succeeds.

    Args:
        out: directory that the run writes.
        fingerprint: everything that the result depends on, by name.
        group: ranks of the run.
        first_step: what is kept before the first block, in words.

    Raises:
        CheckpointError: for a journal of another run, or one that another process holds.
    """
    with shared_journal(out, fingerprint, group) as journal, errors_with_progress(journal, first_step):
        if journal.holds_work and group.is_main:
            _LOG.info(f"Resuming after {finished_work(journal, first_step)}, kept in '{journal.directory}'.")
        yield journal
        group.barrier()
        if group.is_main:
            journal.discard()


@contextmanager
def staged_by_main(
    writer: DirectoryWriter, out: Path, journal: Journal, group: ProcessGroup, nbytes: int
) -> Iterator[Path | None]:
    """Context of the files other than weights, which the main rank writes; None on the others.

    Args:
        writer: of the model.
        out: directory that the run writes.
        journal: holds the files meanwhile.
        group: ranks of the run.
        nbytes: that the journal will still take.

    Raises:
        ConfigError, CheckpointError: see `staged_side_files`.
    """
    if group.is_main:
        with staged_side_files(writer, out, journal.directory, nbytes) as folder:
            yield folder
    else:
        yield None


@contextmanager
def shared_journal(out: Path, fingerprint: Mapping[str, str], group: ProcessGroup) -> Iterator[Journal]:
    """Context of the run's journal: the main rank holds it, the others read it and add their blocks."""
    if group.is_main:
        with open_journal(out, fingerprint) as journal:
            remove_partial(out)
            group.barrier()
            yield journal
    else:
        group.barrier()
        yield follow_journal(out)


@contextmanager
def errors_with_progress(journal: Journal, first_step: str) -> Iterator[None]:
    """Context that adds to errors and interrupts how much of the run is kept, and how to resume it.

    Args:
        journal: of the run.
        first_step: what is kept before the first block, in words.
    """
    try:
        yield
    except (AlpsError, KeyboardInterrupt) as error:
        if not journal.holds_work:
            raise
        reason = str(error) or "Interrupted."
        work = finished_work(journal, first_step)
        kept = f"{work[0].upper()}{work[1:]} {'are' if journal.finished else 'is'} kept in '{journal.directory}'"
        raise type(error)(f"{reason} {kept}: the same command resumes there.") from None


def finished_work(journal: Journal, first_step: str) -> str:
    """Return what a journal holds, in words."""
    return f"{journal.finished} finished blocks" if journal.finished else first_step
