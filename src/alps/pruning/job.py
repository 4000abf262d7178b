"""Prune a checkpoint by its name: check the settings, open the model, prune it, write a directory.

Finished blocks are kept in a journal next to the output, from which a later process resumes the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from alps.checkpoints.atomic_io import check_target
from alps.checkpoints.journal import check_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.progress import NoProgress, Progress
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.load import check_checkpoint, parse_dtype
from alps.models.save import block_bytes
from alps.pruning.config import PruneConfig
from alps.pruning.context import RunContext
from alps.pruning.dry_run import Forecast, forecast
from alps.pruning.journaled_run import journaled_run, staged_by_main
from alps.pruning.recipe import PruneRecipe
from alps.pruning.resume import DiskJournal
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS
from alps.pruning.run import prune_model
from alps.pruning.run_inputs import make_calibration_windows, open_for_run
from alps.pruning.sparsity_allocation import ALLOCATION_TOKENS, PROBE_TOKENS, PROBE_WINDOWS
from alps.pruning.write import write
from alps.reporting.run_report import RunReport
from alps.solvers import Method
from alps.solvers.dense_target import PRIOR_TOKENS

_FIRST_STEP = "the allocation"


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """A checkpoint by its name, and how to prune it.

    Attributes:
        config: the settings.
        method: method object in place of the one that the settings name; None for that one.
        token_ids: calibration windows (windows, tokens) in place of the settings' text; None for the text.
    """

    config: PruneConfig
    method: Method | None = None
    token_ids: Tensor | None = None

    @cached_property
    def recipe(self) -> PruneRecipe:
        """Method, pattern and options as objects."""
        return self.config.resolve(method=self.method)

    @property
    def config_to_save(self) -> PruneConfig | None:
        """The settings if they describe the job completely, else None."""
        return self.config if self.method is None and self.token_ids is None else None

    def fingerprint(self) -> dict[str, str]:
        """Return everything that the pruned weights depend on but model and calibration text, by name."""
        recipe, entries = self.recipe, self.config.fingerprint_fields()
        if self.method is not None:
            entries["method"] = _describe_method(self.method)
        if self.token_ids is not None:
            entries |= dict.fromkeys(("samples", "seqlen", "seed"), "token ids")
        # These are not settings, and another version may have other values.
        if (reconstruction := recipe.reconstruction) is not None:
            entries["reconstruct_steps"] = f"{reconstruction.lr} on {reconstruction.tokens} tokens"
            entries["reconstruct_tokens"] = (
                f"{reconstruction.max_tokens} at most, {reconstruction.max_distinct_tokens} distinct"
            )
        if recipe.dense_target:
            entries["dense_target_prior_tokens"] = str(PRIOR_TOKENS)
        if recipe.allocation != "uniform":
            entries["allocation_tokens"] = f"{ALLOCATION_TOKENS}, probes {PROBE_WINDOWS} x {PROBE_TOKENS}"
        if recipe.row_weights != "equal":
            entries["row_weight_tokens"] = str(ROW_WEIGHT_TOKENS)
        return entries


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
    method: Method | None = None,
    token_ids: Tensor | None = None,
) -> RunReport:
    """Carry out `alps prune`; see `PruneJob` and `run_job`."""
    job = PruneJob(config=config, method=method, token_ids=token_ids)
    return run_job(job, out, make_context(config, progress, group), resume=resume)


def run_job(job: PruneJob, out: Path, context: RunContext, *, resume: bool = False) -> RunReport:
    """Check everything that can be checked, then open the model, prune it and write it.

    Finished blocks are kept next to `out` until it is written, and the same job resumes after them.

    Args:
        job: model and settings, the same on all ranks.
        out: directory to create. All ranks see the same files.
        context: device, ranks and limits; the journal is opened here.
        resume: refuse to start from the first block.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: `out` is not written then.
    """
    config, group = job.config, context.group
    source = _check(job, out)
    context = replace(context, device=group.device(config.device, context.device))
    fingerprint = job.fingerprint()
    group.broadcast_from_main(lambda: check_journal(out, fingerprint, resume))
    start = time.perf_counter()
    loaded = open_for_run(config, source)
    loaded.check_causal()
    load_seconds = time.perf_counter() - start
    fingerprint["model_sha256"] = loaded.identity()
    windows: Windows | None = None
    if source is not None:
        windows = group.broadcast_from_main(lambda: make_calibration_windows(loaded, source, config, context))
        fingerprint["calibration_sha256"] = windows.sha256
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    with journaled_run(out, fingerprint, group, _FIRST_STEP) as journal:
        unfinished = [block for block in loaded.blocks() if block.index >= journal.finished]
        with staged_by_main(loaded.writer, out, journal, group, block_bytes(unfinished)) as side_files:
            report = prune_model(
                loaded,
                windows,
                job.recipe,
                replace(context, journal=DiskJournal(journal, group), spill_folder=journal.directory),
                seed=config.seed if isinstance(source, CalibrationMix) else None,
                load_seconds=load_seconds,
            )
            return write(
                loaded,
                report,
                out,
                config=job.config_to_save,
                journal=journal,
                group=group,
                side_files=side_files,
            )


def estimate_run(config: PruneConfig, out: Path) -> Forecast:
    """Estimate what `prune_checkpoint` would prune, hold in memory and take; writes nothing.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: that the run would raise before it prunes.
    """
    job = PruneJob(config=config)
    source = _check(job, out)
    context = make_context(config, NoProgress())
    loaded = open_for_run(config, source)
    loaded.check_causal()
    return forecast(loaded, job.recipe, context, samples=config.samples, seqlen=config.seqlen)


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
    """Reject what can be rejected without the model, and return the source of the calibration windows."""
    config, recipe = job.config, job.recipe
    parse_dtype(config.dtype)
    if config.model != DEMO_MODEL_NAME:
        check_checkpoint(config.model)
    check_target(out)
    if not recipe.reads_inputs:
        return None
    return load_calibration(config.calibration, config.samples) if job.token_ids is None else job.token_ids
