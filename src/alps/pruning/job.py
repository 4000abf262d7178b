"""Prune a checkpoint by its name: check the settings, open the model, prune it, write a directory.

Finished blocks are kept in a journal beside the output, from which a later process resumes the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alps.checkpoints.atomic_io import check_target, remove_partial
from alps.checkpoints.journal import Journal, check_journal, follow_journal, open_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import AlpsError
from alps.core.progress import NoProgress, Progress
from alps.data.calibration import LoadedModel, load, open_model
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.load import check_model_path, parse_dtype
from alps.pruning.config import PruneConfig
from alps.pruning.context import RunContext
from alps.pruning.dry_run import Forecast, forecast
from alps.pruning.recipe import PruneRecipe
from alps.pruning.resume import DiskJournal
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS
from alps.pruning.run import check_calibrated, make_calibration_windows, prune_model
from alps.pruning.write import write
from alps.reporting.run_report import RunReport
from alps.solvers import Method
from alps.solvers.dense_target import PRIOR_TOKENS

_LOG = logging.getLogger("alps")


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """A checkpoint by its name, and how to prune it.

    Attributes:
        model: directory, GGUF file or hub name.
        recipe: method, pattern and options.
        calibration: text or texts as `alps prune --calibration` takes them, token ids (windows, tokens), or None.
        samples: calibration windows to draw.
        seqlen: tokens in each window.
        seed: of the draws.
        device: name of the device, or `auto`.
        dtype: of the weights, or `auto` for the checkpoint's.
        config: settings that all this was made from, if any; written beside the weights.
    """

    model: str
    recipe: PruneRecipe
    calibration: str | Tensor | None
    samples: int
    seqlen: int
    seed: int
    device: str = "auto"
    dtype: str = "auto"
    config: PruneConfig | None = None

    def fingerprint(self) -> dict[str, str]:
        """Return everything that the pruned weights depend on but model and calibration text, by name."""
        recipe = self.recipe
        entries = self._settings() if self.config is None else dict(self.config.fingerprint_fields())
        if (reconstruction := recipe.reconstruction) is not None:
            # These are no settings, and another version may have other values.
            entries["reconstruct_steps"] = f"{reconstruction.lr} on {reconstruction.tokens} tokens"
        if recipe.dense_target:
            entries["dense_target_prior_tokens"] = str(PRIOR_TOKENS)
        if recipe.row_weights != "equal":
            entries["row_weight_tokens"] = str(ROW_WEIGHT_TOKENS)
        return entries

    def _settings(self) -> dict[str, str]:
        recipe, reconstruction = self.recipe, self.recipe.reconstruction
        drawn = not torch.is_tensor(self.calibration)
        values = {
            "method": _describe_method(recipe.method),
            "pattern": recipe.pattern,
            "rules": recipe.rules,
            "keep_zeros": recipe.keep_zeros,
            "true_sequential": recipe.true_sequential,
            "dense_target": recipe.dense_target,
            "allocation": recipe.allocation,
            "row_weights": recipe.row_weights,
            "reconstruction": None if reconstruction is None else (reconstruction.epochs, reconstruction.target),
            "measure_error": recipe.measure_error,
            "dtype": self.dtype,
            "windows": (self.samples, self.seqlen, self.seed) if drawn else "token ids",
        }
        return {name: value if isinstance(value, str) else repr(value) for name, value in values.items()}


def _describe_method(method: Method) -> str:
    # The repr of a class that is no dataclass may hold nothing but an address.
    return repr(method) if is_dataclass(method) else f"{type(method).__name__} {getattr(method, '__dict__', {})}"


def prune_checkpoint(
    config: PruneConfig,
    out: Path,
    progress: Progress,
    *,
    resume: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> RunReport:
    """Carry out `alps prune`; see `run_job`."""
    return run_job(_make_job(config), out, make_context(config, progress, group), resume=resume)


def run_job(job: PruneJob, out: Path, context: RunContext, *, resume: bool = False) -> RunReport:
    """Check everything that can be checked, then open the model, prune it and write it.

    Finished blocks are kept beside `out` until it is written, and the same job resumes after them.

    Args:
        job: model and settings, the same on all ranks.
        out: directory to create. All ranks see the same files.
        context: device, ranks and limits; the journal is opened here.
        resume: refuse to start from the first block.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: `out` is not written then.
    """
    group = context.group
    source = _check(job, out)
    context = replace(context, device=group.device(job.device, context.device))
    fingerprint = job.fingerprint()
    group.broadcast_from_main(lambda: check_journal(out, fingerprint, resume))
    start = time.perf_counter()
    loaded = _open(job, source)
    load_seconds = time.perf_counter() - start
    fingerprint["model_sha256"] = loaded.identity()
    windows: Windows | None = group.broadcast_from_main(
        lambda: make_calibration_windows(loaded, source, context, samples=job.samples, seqlen=job.seqlen, seed=job.seed)
    )
    if windows is not None:
        fingerprint["calibration_sha256"] = windows.sha256
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    with _shared_journal(out, fingerprint, group) as journal, _errors_with_progress(journal):
        if journal.holds_work and group.is_main:
            _LOG.info(f"Resuming after {_finished_work(journal)}, kept in '{journal.directory}'.")
        report = prune_model(
            loaded,
            windows,
            job.recipe,
            replace(context, journal=DiskJournal(journal, group), spill_folder=journal.directory),
            seed=job.seed if isinstance(source, CalibrationMix) else None,
            load_seconds=load_seconds,
        )
        report = write(loaded, report, out, config=job.config, journal=journal, group=group)
        group.barrier()
        if group.is_main:
            journal.discard()
    return report


def estimate_run(config: PruneConfig, out: Path) -> Forecast:
    """Estimate what `prune_checkpoint` would prune, hold in memory and take; writes nothing.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: that the run would raise before it prunes.
    """
    job = _make_job(config)
    source = _check(job, out)
    context = make_context(config, NoProgress())
    return forecast(_open(job, source), job.recipe, context, samples=job.samples, seqlen=job.seqlen)


def _make_job(config: PruneConfig) -> PruneJob:
    recipe = config.resolve()
    return PruneJob(
        model=config.model,
        recipe=recipe,
        calibration=config.calibration if recipe.reads_inputs else None,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        config=config,
    )


def make_context(config: PruneConfig, progress: Progress, group: ProcessGroup = SINGLE_PROCESS) -> RunContext:
    """Return the environment that the settings ask for.

    Raises:
        ConfigError: when the device does not exist.
    """
    return RunContext(
        device=config.pick_device(),
        group=group,
        progress=progress,
        offload=config.offload,
        activation_bytes=config.activation_bytes,
    )


def _check(job: PruneJob, out: Path) -> CalibrationMix | Tensor | None:
    """Refuse what can be refused without the model, and return the source of the calibration windows."""
    parse_dtype(job.dtype)
    if job.model != DEMO_MODEL_NAME:
        check_model_path(job.model)
    check_target(out)
    check_calibrated(job.recipe, job.calibration is not None)
    return load_calibration(job.calibration, job.samples) if isinstance(job.calibration, str) else job.calibration


def _open(job: PruneJob, source: CalibrationMix | Tensor | None) -> LoadedModel:
    # A model that samples its own text has to be in memory.
    samples_itself = isinstance(source, CalibrationMix) and any(part.text is None for part in source.sources)
    return (load if samples_itself else open_model)(job.model, job.dtype)


@contextmanager
def _shared_journal(out: Path, fingerprint: Mapping[str, str], group: ProcessGroup) -> Iterator[Journal]:
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
def _errors_with_progress(journal: Journal) -> Iterator[None]:
    """Context that adds to errors and interrupts how much of the run is kept, and how to resume it."""
    try:
        yield
    except (AlpsError, KeyboardInterrupt) as error:
        if not journal.holds_work:
            raise
        reason = str(error) or "Interrupted."
        work = _finished_work(journal)
        kept = f"{work[0].upper()}{work[1:]} {'are' if journal.finished else 'is'} kept in '{journal.directory}'"
        raise type(error)(f"{reason} {kept}: the same command resumes there.") from None


def _finished_work(journal: Journal) -> str:
    return f"{journal.finished} finished blocks" if journal.finished else "the allocation"
