"""`alps prune`: from a model's name to a pruned directory, by way of a journal that a later process can go on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alps.api import build_walk, run, write
from alps.checkpoints.directory import check_target, remove_partial
from alps.checkpoints.journal import Journal, check_journal, follow_journal, open_journal
from alps.config import PruneSettings
from alps.data.mix import Mix, load_calibration
from alps.distributed import Group
from alps.errors import AlpsError
from alps.forecast import Forecast, forecast
from alps.loaded import Loaded, load, open_model
from alps.models.load import check_model_path, parse_dtype
from alps.models.packaged import NAME as PACKAGED
from alps.progress import Silent, Watcher
from alps.report import RunReport
from alps.resume import Resumable
from alps.walk import Walk


def prune_directory(
    settings: PruneSettings,
    out: Path,
    watcher: Watcher,
    tell: Callable[[str], None],
    resume: bool = False,
    group: Group | None = None,
) -> RunReport:
    """What `alps prune` does: check everything that can be checked, then open the model, prune and write.

    Finished blocks are kept beside `out` until it is written, and a run of the same settings goes on after them.

    Args:
        resume: refuse to begin anew.
        group: the processes that do it together, each with the same arguments; None for this one alone. They see the
            same files.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: one sentence each; `out` is not written
            then.
    """
    group = group or Group()
    walk, source = _checked(settings, out, watcher)
    walk.group, walk.device = group, group.device(settings.device, walk.device)
    group.first(lambda: check_journal(out, settings.facts(), resume))
    start = time.perf_counter()
    loaded = _opened(settings, source, tell)
    seconds = time.perf_counter() - start
    facts = {**settings.facts(), "the model's weights": loaded.identity()}
    windows = None
    if source is not None:
        drawn = (source, settings.samples, settings.seqlen, settings.seed)
        windows = group.first(lambda: loaded.calibration(*drawn, walk.device, watcher, tell))
        facts["the calibration's hash"] = windows.sha256
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    with _shared_journal(out, facts, group) as journal, _kept(journal):
        if journal.finished and group.leads:
            tell(f"Going on after {journal.finished} finished blocks, kept in '{journal.place}'.")
        walk.resumable, walk.spill_folder = Resumable(journal, group), journal.place
        report = run(loaded, walk, windows, settings.seed)
        report.add_seconds("load", seconds)
        write(loaded, report, out, settings, tell=tell, journal=journal, group=group)
        group.wait()
        if group.leads:
            journal.discard()
    return report


@contextmanager
def _shared_journal(out: Path, facts: Mapping[str, str], group: Group) -> Iterator[Journal]:
    """The journal of a run: the first process holds it, the others read it and add their blocks."""
    if group.leads:
        with open_journal(out, facts) as journal:
            remove_partial(out)
            group.wait()
            yield journal
    else:
        group.wait()
        yield follow_journal(out)


def foresee(settings: PruneSettings, out: Path, tell: Callable[[str], None]) -> Forecast:
    """What `prune_directory` would do, hold and take; writes nothing.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: what it would raise before it prunes.
    """
    walk, source = _checked(settings, out, Silent())
    return forecast(_opened(settings, source, tell), walk, settings.samples, settings.seqlen)


def _checked(settings: PruneSettings, out: Path, watcher: Watcher) -> tuple[Walk, Mix | None]:
    """The walk, and what calibrates it if anything; refuses what can be refused without the model."""
    parse_dtype(settings.dtype)
    if settings.model != PACKAGED:
        check_model_path(settings.model)
    walk = build_walk(settings, watcher)
    check_target(out)
    return walk, load_calibration(settings.calibration, settings.samples) if walk.reads_inputs else None


def _opened(settings: PruneSettings, source: Mix | None, tell: Callable[[str], None]) -> Loaded:
    # A model that samples its own text has to be whole.
    samples_itself = source is not None and any(part.text is None for part in source.parts)
    return (load if samples_itself else open_model)(settings.model, settings.dtype, tell)


@contextmanager
def _kept(journal: Journal) -> Iterator[None]:
    """Say at the end of a failure or interrupt what of the run is kept, and how it goes on."""
    try:
        yield
    except (AlpsError, KeyboardInterrupt) as error:
        if not journal.finished:
            raise
        words = str(error) or "Interrupted."
        kept = f"{journal.finished} finished blocks are kept in '{journal.place}': the same command goes on after them."
        raise type(error)(f"{words} {kept}") from None
