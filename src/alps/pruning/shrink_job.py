"""Shrink a checkpoint by its name: check the settings, open the model, shrink it, write a directory.

Finished blocks are kept in a journal next to the output, from which a later process resumes the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from alps.checkpoints.atomic_io import check_target as check_output
from alps.checkpoints.journal import check_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.memory import peak_device_bytes, peak_host_bytes
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.load import check_checkpoint, parse_dtype
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel
from alps.pruning.block_removal import REMOVAL_TOKENS
from alps.pruning.environment import RunEnvironment
from alps.pruning.journaled_run import journaled_run, staged_by_main
from alps.pruning.latency_llama import check_llama
from alps.pruning.run_inputs import make_calibration_windows
from alps.pruning.shrink_choice import ShrinkChoice, choose_structure, open_search
from alps.pruning.shrink_config import LLAMA, ShrinkConfig
from alps.pruning.shrink_context import ShrinkContext, ShrinkJournal
from alps.pruning.shrink_pipeline import make_run, shrink_blocks
from alps.pruning.shrink_plan import ShrinkPlan, log_plan, open_plan
from alps.pruning.shrink_target import changed_fields
from alps.pruning.shrink_write import ShrunkWriter, write_shrunk
from alps.reporting.records import calibration_record
from alps.reporting.shrink_report import ShrinkReport, ShrunkBlock


@dataclass(frozen=True, kw_only=True)
class ShrinkJob:
    """A checkpoint by its name or in memory, and how to shrink it.

    Attributes:
        config: the settings.
        token_ids: calibration windows (windows, tokens) in place of the settings' text; None for the text.
        loaded: model in memory in place of the one that the settings name, which stays unchanged; None for that one.
    """

    config: ShrinkConfig
    token_ids: Tensor | None = None
    loaded: LoadedModel | None = None

    @property
    def config_to_save(self) -> ShrinkConfig | None:
        """The settings if they describe the job completely, else None."""
        return self.config if self.token_ids is None and self.loaded is None else None

    @property
    def seed(self) -> int | None:
        """Seed that draws the windows; None for token ids."""
        return None if self.token_ids is not None else self.config.seed

    @property
    def first_step(self) -> str:
        """Work before the first block, in words."""
        return "the choice of blocks or experts" if self.config.speedup is None else "the search for a speed"

    def fingerprint(self) -> dict[str, str]:
        """Return everything that the weights depend on but model and calibration text, by name."""
        config, entries = self.config, self.config.fingerprint_fields() | {"job": "shrink"}
        if self.token_ids is not None:
            entries |= dict.fromkeys(("samples", "seqlen", "seed"), "token ids")
        # These are not settings, and another version may have other values.
        if (reconstruction := config.reconstruction()) is not None:
            entries["reconstruct_steps"] = f"{reconstruction.lr} on {reconstruction.tokens} tokens"
        if config.blocks is not None:
            entries["removal_tokens"] = str(REMOVAL_TOKENS)
        return entries


def shrink_checkpoint(
    config: ShrinkConfig,
    out: Path,
    progress: Progress,
    *,
    resume: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
    token_ids: Tensor | None = None,
    loaded: LoadedModel | None = None,
) -> ShrinkReport:
    """Check everything that can be checked, then open the model, shrink it and write it.

    Finished blocks are kept next to `out` until it is written, and the same call resumes after them.

    Args:
        config: the settings.
        out: directory to create. All ranks see the same files.
        progress: receives every block.
        resume: refuse to start from the first block.
        group: ranks of the run.
        token_ids: see `ShrinkJob`.
        loaded: see `ShrinkJob`.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: `out` is not written then.
    """
    job = ShrinkJob(config=config, token_ids=token_ids, loaded=loaded)
    source = _check(job, out)
    device = group.device(config.device, config.pick_device())
    entries = job.fingerprint()
    group.broadcast_from_main(lambda: check_journal(out, entries, resume))
    start = time.perf_counter()
    plan = open_plan(config, source, loaded)
    loaded = plan.loaded
    loaded.check_causal()
    load_seconds = time.perf_counter() - start
    environment = RunEnvironment(device=device, group=group, progress=progress)
    windows: Windows = group.broadcast_from_main(
        lambda: make_calibration_windows(plan.loaded, source, config, environment)
    )
    loaded.check_ids(windows)
    if config.speedup is None:
        log_plan(plan, group)
    entries |= {"model_sha256": loaded.identity(), "calibration_sha256": windows.sha256}
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    with journaled_run(out, entries, group, job.first_step) as journal:
        context = ShrinkContext(
            device=device,
            journal=ShrinkJournal(journal, group),
            group=group,
            progress=progress,
            offload=config.offload,
            activation_bytes=config.activation_bytes,
            spill_folder=journal.directory,
        )
        return _shrink(job, plan, windows, context, out, start=start, load_seconds=load_seconds)


def plan_shrink(config: ShrinkConfig, out: Path) -> list[str]:
    """Describe what `shrink_checkpoint` would write, as lines of text; nothing is written.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: that the run would raise before it shrinks.
    """
    source = _check(ShrinkJob(config=config), out)
    device = config.pick_device()
    plan = open_plan(config, source)
    plan.loaded.check_causal()
    plan.loaded.check_length(config.seqlen)
    if (search := open_search(config, plan, device)) is not None:
        lines = [f"{candidate.describe()}." for candidate in search.predict().candidates]
        return [*lines, "The divergence of quick passes chooses among these. Nothing was shrunk or written."]
    return [*plan.lines, "Nothing was shrunk or written."]


def _check(job: ShrinkJob, out: Path) -> CalibrationMix | Tensor:
    """Reject what can be rejected without the model, and return the source of the calibration windows."""
    config = job.config
    config.check_cuts()
    parse_dtype(config.dtype)
    if job.loaded is None and config.model != DEMO_MODEL_NAME:
        check_checkpoint(config.model)
    check_output(out)
    if config.speedup is not None and config.runtime == LLAMA:
        check_llama()
    return load_calibration(config.calibration, config.samples) if job.token_ids is None else job.token_ids


def _shrink(
    job: ShrinkJob,
    plan: ShrinkPlan,
    windows: Windows,
    context: ShrinkContext,
    out: Path,
    *,
    start: float,
    load_seconds: float,
) -> ShrinkReport:
    """Choose what goes, shrink the blocks that stay, and write the directory.

    Args:
        job: model and settings.
        plan: the open model, and what it becomes.
        windows: calibration windows.
        context: device, ranks, journal.
        out: directory to create.
        start: time at which the run began.
        load_seconds: time that it took to open the model.
    """
    loaded, group = plan.loaded, context.group
    training = loaded.model.training
    loaded.model.eval()
    try:
        choice = choose_structure(job.config, plan, windows.ids, context)
        small = ShrunkModel.of(empty_shrunk_model(loaded.model, loaded.blocks(), choice.target))
        writer = ShrunkWriter(loaded, small, plan.structure, choice.target)
        with staged_by_main(writer, out, context.journal.journal, group, small.nbytes) as side_files:
            run = make_run(
                loaded,
                plan.structure,
                choice.target,
                context,
                small=small,
                experts=choice.experts,
                reconstruction=job.config.reconstruction(),
            )
            blocks, seconds = shrink_blocks(run, windows.ids)
            choice = choice.confirmed(group)
            seconds = {"load": load_seconds, **choice.seconds, **seconds, "total": time.perf_counter() - start}
            report = _report(job, choice, small, windows, blocks=blocks, seconds=seconds, context=context)
            return write_shrunk(
                writer, report, out, config=job.config_to_save, journal=context.journal, side_files=side_files
            )
    finally:
        loaded.model.train(training)


def _report(
    job: ShrinkJob,
    choice: ShrinkChoice,
    small: ShrunkModel,
    windows: Windows,
    *,
    blocks: list[ShrunkBlock],
    seconds: dict[str, float],
    context: ShrinkContext,
) -> ShrinkReport:
    plan, model = choice.plan, choice.plan.loaded.model
    fields = changed_fields(model.config, small.model.config)[1]
    return ShrinkReport(
        model=plan.loaded.name,
        architecture=type(small.model).__name__,
        dtype=dtype_name(next(model.parameters()).dtype),
        device=str(context.device),
        before=plan.before,
        after=plan.after.model_copy(update={"fields": fields}),
        calibration=calibration_record(windows, job.seed),
        removals=choice.removals,
        experts=choice.experts,
        blocks=blocks,
        seconds=seconds,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(context.device),
        versions=provenance(),
        speedup=choice.speedup,
    )
