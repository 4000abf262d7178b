"""From a model's name to a pruned directory, by way of a journal that a later process can go on with."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from alps.checkpoints.atomic_io import check_target, remove_partial
from alps.checkpoints.journal import Journal, check_journal, follow_journal, open_journal
from alps.core.distributed import ProcessGroup
from alps.core.errors import AlpsError
from alps.core.progress import NoProgress, Progress
from alps.data.calibration import LoadedModel, load, open_model
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.load import check_model_path, parse_dtype
from alps.pruning.config import PruneConfig
from alps.pruning.dry_run import Forecast, forecast
from alps.pruning.pipeline import BlockPruner
from alps.pruning.resume import ResumableRun
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS
from alps.pruning.run import build_block_pruner, check_calibrated, make_calibration_windows, run, write
from alps.reporting.run_report import RunReport
from alps.solvers import Method
from alps.solvers.dense_target import PRIOR_TOKENS

_LOG = logging.getLogger("alps")


@dataclass(frozen=True)
class PruneJob:
    """A model by its name, and what is to be done to it.

    Attributes:
        model: what `alps prune` takes as MODEL.
        walk: method, pattern and all else that is said of the sites.
        calibration: what `alps prune --calibration` takes, or token ids (windows, tokens), or None.
        samples, seqlen, seed: windows to draw, unless they are given.
        device, dtype: as `alps prune` takes them.
        settings: that all this was made from, if any; saved beside the weights.
    """

    model: str
    walk: BlockPruner
    calibration: str | Tensor | None
    samples: int
    seqlen: int
    seed: int
    device: str = "auto"
    dtype: str = "auto"
    settings: PruneConfig | None = None
    facts: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        facts = self._described() if self.settings is None else dict(self.settings.fingerprint_fields())
        if (matching := self.walk.matching) is not None:
            # They are no settings, and another version may take others.
            facts["reconstruct_steps"] = f"{matching.rate} on {matching.tokens} tokens"
        if self.walk.target:
            facts["dense_target_prior_tokens"] = str(PRIOR_TOKENS)
        if self.walk.channels != "equal":
            facts["row_weight_tokens"] = str(ROW_WEIGHT_TOKENS)
        object.__setattr__(self, "facts", facts)

    def _described(self) -> dict[str, str]:
        """Everything that the pruned weights depend on beside the model and its text."""
        walk, drawn = self.walk, not torch.is_tensor(self.calibration)
        values = {
            "method": _method_in_words(walk.method),
            "pattern": walk.pattern,
            "true_sequential": walk.order,
            "dense_target": walk.target,
            "reconstruct_epochs": 0 if walk.matching is None else (walk.matching.epochs, walk.matching.target),
            "allocation": walk.budget,
            "row_weights": walk.channels,
            "rules": walk.rules,
            "keep_zeros": walk.respect_zeros,
            "measure_error": walk.measure_errors,
            "dtype": self.dtype,
            "windows": (self.samples, self.seqlen, self.seed) if drawn else "given",
        }
        return {name: value if isinstance(value, str) else repr(value) for name, value in values.items()}


def _method_in_words(method: Method) -> str:
    # A class of somebody else's may say nothing of itself but its address.
    return repr(method) if is_dataclass(method) else f"{type(method).__name__} {getattr(method, '__dict__', {})}"


def prune_directory(
    settings: PruneConfig,
    out: Path,
    progress: Progress,
    resume: bool = False,
    group: ProcessGroup | None = None,
) -> RunReport:
    """What `alps prune` does; see `prune_job`."""
    return prune_job(_job(settings, progress), out, resume, group)


def prune_job(
    job: PruneJob,
    out: Path,
    resume: bool = False,
    group: ProcessGroup | None = None,
) -> RunReport:
    """Check everything that can be checked, then open the model, prune and write.

    Finished blocks are kept beside `out` until it is written, and the same job goes on after them.

    Args:
        resume: refuse to begin anew.
        group: the processes that do it together, each with the same arguments; None for this one alone. They see the
            same files.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: one sentence each; `out` is not written
            then.
    """
    group, walk = group or ProcessGroup(), job.walk
    source = _checked(job, out)
    walk.group, walk.device = group, group.device(job.device, walk.device)
    group.broadcast_from_main(lambda: check_journal(out, job.facts, resume))
    start = time.perf_counter()
    loaded = _opened(job, source)
    seconds = time.perf_counter() - start
    facts = {**job.facts, "model_sha256": loaded.identity()}
    drawn = (source, job.samples, job.seqlen, job.seed, walk)
    windows: Windows | None = group.broadcast_from_main(lambda: make_calibration_windows(loaded, *drawn))
    if windows is not None:
        facts["calibration_sha256"] = windows.sha256
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    with _shared_journal(out, facts, group) as journal, _kept(journal):
        if journal.holds_work and group.is_main:
            _LOG.info(f"Going on after {_done(journal)}, kept in '{journal.directory}'.")
        walk.resumable, walk.spill_folder = ResumableRun(journal, group), journal.directory
        report = run(loaded, walk, windows, job.seed if isinstance(source, CalibrationMix) else None)
        report.add_seconds("load", seconds)
        write(loaded, report, out, job.settings, journal=journal, group=group)
        group.barrier()
        if group.is_main:
            journal.discard()
    return report


@contextmanager
def _shared_journal(out: Path, facts: Mapping[str, str], group: ProcessGroup) -> Iterator[Journal]:
    """The journal of a run: the first process holds it, the others read it and add their blocks."""
    if group.is_main:
        with open_journal(out, facts) as journal:
            remove_partial(out)
            group.barrier()
            yield journal
    else:
        group.barrier()
        yield follow_journal(out)


def estimate_run(settings: PruneConfig, out: Path) -> Forecast:
    """What `prune_directory` would do, hold and take; writes nothing.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: what it would raise before it prunes.
    """
    job = _job(settings, NoProgress())
    source = _checked(job, out)
    return forecast(_opened(job, source), job.walk, settings.samples, settings.seqlen)


def _job(settings: PruneConfig, progress: Progress) -> PruneJob:
    walk = build_block_pruner(settings, progress)
    source = settings.calibration if walk.reads_inputs else None
    sizes = (settings.samples, settings.seqlen, settings.seed)
    return PruneJob(settings.model, walk, source, *sizes, settings.device, settings.dtype, settings)


def _checked(job: PruneJob, out: Path) -> CalibrationMix | Tensor | None:
    """What the windows are or are drawn from, if any; refuses what can be refused without the model."""
    parse_dtype(job.dtype)
    if job.model != DEMO_MODEL_NAME:
        check_model_path(job.model)
    check_target(out)
    check_calibrated(job.walk, job.calibration is not None)
    return load_calibration(job.calibration, job.samples) if isinstance(job.calibration, str) else job.calibration


def _opened(job: PruneJob, source: CalibrationMix | Tensor | None) -> LoadedModel:
    # A model that samples its own text has to be whole.
    samples_itself = isinstance(source, CalibrationMix) and any(part.text is None for part in source.sources)
    return (load if samples_itself else open_model)(job.model, job.dtype)


@contextmanager
def _kept(journal: Journal) -> Iterator[None]:
    """Say at the end of a failure or interrupt what of the run is kept, and how it goes on."""
    try:
        yield
    except (AlpsError, KeyboardInterrupt) as error:
        if not journal.holds_work:
            raise
        words = str(error) or "Interrupted."
        done = _done(journal)
        kept = f"{done[0].upper()}{done[1:]} {'are' if journal.finished else 'is'} kept in '{journal.directory}'"
        raise type(error)(f"{words} {kept}: the same command goes on from there.") from None


def _done(journal: Journal) -> str:
    """What need not be done again, in words."""
    return f"{journal.finished} finished blocks" if journal.finished else "the plan of the budget"
