"""Shrink a checkpoint by its name: check the settings, open the model, shrink it, write a directory.

Finished blocks are kept in a journal next to the output, from which a later process resumes the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alps.checkpoints.atomic_io import check_target as check_output
from alps.checkpoints.journal import Journal, check_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import ConfigError
from alps.core.memory import peak_device_bytes, peak_host_bytes
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.finetuning.block_reconstruction import ReconstructionParameters
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.load import check_checkpoint, parse_dtype
from alps.models.save import staged_side_files
from alps.models.shrink_families import adds_output, family_of
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel
from alps.models.structure import Structure, Target
from alps.pruning.block_removal import REMOVAL_TOKENS, choose_removals
from alps.pruning.journaled_run import errors_with_progress, finished_work, shared_journal
from alps.pruning.latency import Runtime, transformers_runtime
from alps.pruning.latency_llama import check_llama, llama_runtime
from alps.pruning.shrink_config import LLAMA, ShrinkConfig
from alps.pruning.shrink_context import ShrinkContext, ShrinkJournal
from alps.pruning.shrink_experts import ExpertCut, check_windows, choose_kept_experts
from alps.pruning.shrink_layers import Cutter
from alps.pruning.shrink_pipeline import ShrinkRun, shrink_blocks
from alps.pruning.shrink_plan import ShrinkPlan, describe_plan, open_plan
from alps.pruning.shrink_target import changed_fields
from alps.pruning.shrink_write import ShrunkWriter, write_shrunk
from alps.pruning.speedup_search import SpeedupSearch, choose_mix
from alps.reporting.records import CalibrationRecord, calibration_record
from alps.reporting.shrink_report import BlockRemoval, ExpertSelection, ShrinkReport

_LOG = logging.getLogger("alps")
_FIRST_STEP = "the choice of blocks or experts"


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
        token_ids: calibration windows (windows, tokens) in place of the settings' text.
        loaded: model in memory in place of the one that the settings name; it stays unchanged.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError, RankLost: `out` is not written then.
    """
    source = _check(config, out, token_ids, loaded)
    # The settings of a model or windows in memory do not describe the run.
    saved = config if token_ids is None and loaded is None else None
    device = group.device(config.device, config.pick_device())
    entries = _fingerprint(config, token_ids)
    group.broadcast_from_main(lambda: check_journal(out, entries, resume))
    start = time.perf_counter()
    plan = open_plan(config, source, loaded)
    loaded = plan.loaded
    loaded.check_causal()
    load_seconds = time.perf_counter() - start
    windows: Windows = group.broadcast_from_main(lambda: _windows(loaded, source, config, device, progress))
    loaded.check_ids(windows)
    if config.speedup is None:
        _log_plan(plan, group)
    entries |= {"model_sha256": loaded.identity(), "calibration_sha256": windows.sha256}
    if loaded.store is not None:
        loaded.store.check_finite(group.rank, group.size)
    first_step = _FIRST_STEP if config.speedup is None else "the search for a speed"
    with shared_journal(out, entries, group) as journal, errors_with_progress(journal, first_step):
        if journal.holds_work and group.is_main:
            _LOG.info(f"Resuming after {finished_work(journal, first_step)}, kept in '{journal.directory}'.")
        context = ShrinkContext(
            device=device,
            journal=ShrinkJournal(journal, group),
            group=group,
            progress=progress,
            offload=config.offload,
            activation_bytes=config.activation_bytes,
            spill_folder=journal.directory,
        )
        seed = None if token_ids is not None else config.seed
        report = _shrink(
            config,
            plan,
            windows,
            context,
            out,
            saved=saved,
            calibration=calibration_record(windows, seed),
            start=start,
            load_seconds=load_seconds,
        )
        group.barrier()
        if group.is_main:
            journal.discard()
    return report


def plan_shrink(config: ShrinkConfig, out: Path) -> list[str]:
    """Describe what `shrink_checkpoint` would write, as lines of text; nothing is written.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: that the run would raise before it shrinks.
    """
    source = _check(config, out, None, None)
    device = config.pick_device()
    plan = open_plan(config, source)
    plan.loaded.check_causal()
    plan.loaded.check_length(config.seqlen)
    if (search := _speedup_search(config, plan, device)) is not None:
        lines = [f"{candidate.describe()}." for candidate in search.predict().candidates]
        return [*lines, "The divergence of quick passes chooses among these. Nothing was shrunk or written."]
    return [*plan.lines, "Nothing was shrunk or written."]


def _fingerprint(config: ShrinkConfig, token_ids: Tensor | None) -> dict[str, str]:
    """Return everything that the weights depend on but model and calibration text, by name."""
    entries = config.fingerprint_fields() | {"job": "shrink"}
    if token_ids is not None:
        entries |= dict.fromkeys(("samples", "seqlen", "seed"), "token ids")
    # These are not settings, and another version may have other values.
    if (reconstruction := config.reconstruction()) is not None:
        entries["reconstruct_steps"] = f"{reconstruction.lr} on {reconstruction.tokens} tokens"
    if config.blocks is not None:
        entries["removal_tokens"] = str(REMOVAL_TOKENS)
    return entries


def _check(
    config: ShrinkConfig, out: Path, token_ids: Tensor | None, loaded: LoadedModel | None
) -> CalibrationMix | Tensor:
    """Reject what can be rejected without the model, and return the source of the calibration windows."""
    config.check_cuts()
    parse_dtype(config.dtype)
    if loaded is None and config.model != DEMO_MODEL_NAME:
        check_checkpoint(config.model)
    check_output(out)
    if config.speedup is not None and config.runtime == LLAMA:
        check_llama()
    return load_calibration(config.calibration, config.samples) if token_ids is None else token_ids


def _log_plan(plan: ShrinkPlan, group: ProcessGroup) -> None:
    if group.is_main:
        for line in plan.lines:
            _LOG.info(line)


def _windows(
    loaded: LoadedModel,
    source: CalibrationMix | Tensor,
    config: ShrinkConfig,
    device: torch.device,
    progress: Progress,
) -> Windows:
    if isinstance(source, Tensor):
        if config.bos:
            raise ConfigError("`bos` is for windows of a text: put the BOS token into the token ids.")
        return loaded.token_ids(source)
    return loaded.calibration(source, config.samples, config.seqlen, config.seed, device, progress, bos=config.bos)


def _shrink(
    config: ShrinkConfig,
    plan: ShrinkPlan,
    windows: Windows,
    context: ShrinkContext,
    out: Path,
    *,
    saved: ShrinkConfig | None,
    calibration: CalibrationRecord,
    start: float,
    load_seconds: float,
) -> ShrinkReport:
    """Choose the blocks, shrink the others, and write the directory.

    Args:
        config: the settings.
        plan: the open model, and what it becomes.
        windows: calibration windows.
        context: device, ranks, journal.
        out: directory to create.
        saved: settings to write next to the weights; None if they do not describe the run.
        calibration: record of the windows.
        start: time at which the run began.
        load_seconds: time that it took to open the model.
    """
    loaded, group = plan.loaded, context.group
    training = loaded.model.training
    loaded.model.eval()
    try:
        choice_start = time.perf_counter()
        search, speedup = _speedup_search(config, plan, context.device), None
        if search is None:
            removals = _removals(config, plan, windows.ids, context)
        else:
            speedup = choose_mix(search, windows.ids, context, partial(_make_run, loaded, plan.structure))
            removals = speedup.removals[: speedup.chosen.removed]
            plan = describe_plan(loaded, search.target(speedup.chosen, removals))
            _log_plan(plan, group)
        choice_seconds = time.perf_counter() - choice_start
        removed = {removal.block for removal in removals}
        kept = tuple(index for index in range(plan.structure.blocks) if index not in removed)
        target = replace(plan.target, kept_blocks=kept)
        experts, experts_seconds = _experts(plan, windows.ids, context)
        small = ShrunkModel.of(empty_shrunk_model(loaded.model, loaded.blocks(), target))
        writer = ShrunkWriter(loaded, small, plan.structure, target)
        with _staged(writer, out, context.journal.journal, small, group) as side_files:
            run = _make_run(
                loaded,
                plan.structure,
                target,
                context,
                small=small,
                experts=experts,
                reconstruction=config.reconstruction(),
            )
            blocks, seconds = shrink_blocks(run, windows.ids)
            phases = {"load": load_seconds, "removal": choice_seconds, "experts": experts_seconds, **seconds}
            if search is not None and speedup is not None:
                confirm_start = time.perf_counter()
                speed = group.broadcast_from_main(lambda: search.measure(target))
                speedup = speedup.model_copy(update={"measured": speed})
                phases["removal"] += time.perf_counter() - confirm_start
            report = ShrinkReport(
                model=loaded.name,
                architecture=type(small.model).__name__,
                dtype=dtype_name(next(loaded.model.parameters()).dtype),
                device=str(context.device),
                before=plan.before,
                after=plan.after.model_copy(update={"fields": _fields(loaded.model, small)}),
                calibration=calibration,
                removals=removals,
                experts=experts,
                blocks=blocks,
                seconds={**phases, "total": time.perf_counter() - start},
                peak_host_bytes=peak_host_bytes(),
                peak_device_bytes=peak_device_bytes(context.device),
                versions=provenance(),
                speedup=speedup,
            )
            return write_shrunk(writer, report, out, config=saved, journal=context.journal, side_files=side_files)
    finally:
        loaded.model.train(training)


def _make_run(
    loaded: LoadedModel,
    structure: Structure,
    target: Target,
    context: ShrinkContext,
    *,
    small: ShrunkModel | None = None,
    experts: ExpertSelection | None = None,
    reconstruction: ReconstructionParameters | None = None,
) -> ShrinkRun:
    """Return a run for a complete target; the smaller model is built unless it is given."""
    model, blocks = loaded.model, loaded.blocks()
    return ShrinkRun(
        model=model,
        blocks=blocks,
        shrunk=small or ShrunkModel.of(empty_shrunk_model(model, blocks, target)),
        cutter=Cutter(
            family=family_of(model),
            structure=structure,
            target=target,
            adds_output=adds_output(model),
            device=context.device,
            group=context.group,
            experts=ExpertCut(structure, target, {} if experts is None else experts.kept),
        ),
        reconstruction=reconstruction,
        context=context,
    )


def open_runtime(name: str, loaded: LoadedModel, device: torch.device) -> Runtime:
    """Return the runtime of a name of `RUNTIMES`, for models like the one that is open."""
    return llama_runtime(loaded.tokenizer) if name == LLAMA else transformers_runtime(device)


def _speedup_search(config: ShrinkConfig, plan: ShrinkPlan, device: torch.device) -> SpeedupSearch | None:
    """Return the search for the speed that the settings name; None if they name numbers of units."""
    if config.speedup is None or plan.choices is None:
        return None
    return SpeedupSearch(
        model=plan.loaded.model,
        blocks=plan.loaded.blocks(),
        speed=config.speedup,
        runtime_name=config.runtime,
        runtime=open_runtime(config.runtime, plan.loaded, device),
        choices=plan.choices,
    )


def _fields(model: nn.Module, small: ShrunkModel) -> dict[str, Any]:
    return changed_fields(model.config, small.model.config)[1]


def _removals(config: ShrinkConfig, plan: ShrinkPlan, ids: Tensor, context: ShrinkContext) -> list[BlockRemoval]:
    """Return the blocks to remove: those of the settings, those that the journal holds, or new ones."""
    if config.drop_blocks or config.blocks is None:
        return [BlockRemoval(block=index, kl=None) for index in config.drop_blocks]
    removals = context.journal.load_removals()
    if removals is None:
        loaded, count = plan.loaded, config.blocks
        blocks = loaded.blocks()
        if context.group.is_main:
            context.progress.start("choose blocks", count * len(blocks))
        try:
            removals = context.group.broadcast_from_main(
                lambda: choose_removals(
                    loaded.model,
                    blocks,
                    ids,
                    count,
                    device=context.device,
                    on_block_done=lambda _: context.progress.step(""),
                )
            )
        finally:
            context.progress.finish()
        context.journal.save_removals(removals)
    return removals


def _experts(plan: ShrinkPlan, ids: Tensor, context: ShrinkContext) -> tuple[ExpertSelection | None, float]:
    """Return the choice of the experts that stay, None if all do, and the seconds that it took."""
    start, cut = time.perf_counter(), ExpertCut(plan.structure, plan.target)
    if cut.is_needed:
        check_windows(ids)
    if not cut.cuts_experts:
        return None, 0.0
    loaded, count = plan.loaded, plan.target.experts or 0
    selection = choose_kept_experts(loaded.model, loaded.blocks(), ids, count, context)
    return selection, time.perf_counter() - start


@contextmanager
def _staged(
    writer: ShrunkWriter, out: Path, journal: Journal, small: ShrunkModel, group: ProcessGroup
) -> Iterator[Path | None]:
    """Context of the files other than weights, written by the main rank; see `staged_side_files`."""
    if group.is_main:
        with staged_side_files(writer, out, journal.directory, small.nbytes) as folder:
            yield folder
    else:
        yield None
