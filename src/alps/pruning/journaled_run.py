"""Journal of a run as a context of all its ranks, and errors that say how much of the run is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alps.checkpoints.atomic_io import remove_partial
from alps.checkpoints.journal import Journal, follow_journal, open_journal
from alps.core.distributed import ProcessGroup
from alps.core.errors import AlpsError


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
