"""`alps prune`: from a model's name to a pruned directory, by way of a journal that a later process can go on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alps.api import build_walk, run, write
from alps.checkpoints.directory import check_target, remove_partial
from alps.checkpoints.journal import Journal, check_journal, open_journal
from alps.config import PruneSettings
from alps.data.mix import Mix, load_calibration
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
    settings: PruneSettings, out: Path, watcher: Watcher, tell: Callable[[str], None], resume: bool = False
) -> RunReport:
    """What `alps prune` does: check everything that can be checked, then open the model, prune and write.

    Finished blocks are kept beside `out` until it is written, and a run of the same settings goes on after them.

    Args:
        resume: refuse to begin anew.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: one sentence each; `out` is not written then.
    """
    walk, source = _checked(settings, out, watcher)
    check_journal(out, settings.facts(), resume)
    start = time.perf_counter()
    loaded = _opened(settings, source, tell)
    seconds = time.perf_counter() - start
    facts = {**settings.facts(), "the model's weights": loaded.identity()}
    windows = None
    if source is not None:
        drawn = (settings.samples, settings.seqlen, settings.seed)
        windows = loaded.calibration(source, *drawn, walk.device, watcher, tell)
        facts["the calibration's hash"] = windows.sha256
    if loaded.store is not None:
        loaded.store.check_finite()
    with open_journal(out, facts) as journal, _kept(journal):
        remove_partial(out)
        if journal.finished:
            tell(f"Going on after {journal.finished} finished blocks, kept in '{journal.place}'.")
        walk.resumable, walk.spill_folder = Resumable(journal), journal.place
        report = run(loaded, walk, windows, settings.seed)
        report.add_seconds("load", seconds)
        write(loaded, report, out, settings, tell=tell, journal=journal)
        journal.discard()
    return report


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
