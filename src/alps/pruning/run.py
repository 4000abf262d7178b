"""A run on a model that is open: the walk that settings ask for, what it reports, and the directory it writes."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn

from alps.checkpoints.atomic_io import new_directory
from alps.checkpoints.journal import Journal
from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.core.memory import peak_device_bytes, peak_host_bytes
from alps.core.progress import NoProgress, Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.calibration import LoadedModel
from alps.data.mixture import CalibrationMix
from alps.data.windows import Windows
from alps.models.auto_class import is_composite
from alps.models.finite_check import check_result
from alps.models.save import save_model, save_without_weights, write_weight_files
from alps.pruning.config import SETTINGS_NAME, PruneConfig
from alps.pruning.context import RunContext
from alps.pruning.pipeline import BlockPruner
from alps.pruning.recipe import PruneRecipe
from alps.pruning.sparsity_allocation import check_fit
from alps.reporting.model_card import model_card
from alps.reporting.publish import publish_run
from alps.reporting.records import calibration_record
from alps.reporting.run_report import REPORT_NAME, RunReport

_PRUNED_TARGET = (
    "the experts were pruned with --dense-target 0: a router may send them other tokens in the pruned model than in "
    "the dense one, so that their inputs cannot be compared."
)


def build_block_pruner(settings: PruneConfig, progress: Progress | None = None) -> BlockPruner:
    """The walk that settings ask for, on no model yet.

    Raises:
        ConfigError: for settings that contradict each other or do not exist, or a device that is not here.
    """
    return block_pruner(
        settings.resolve(),
        RunContext(
            device=settings.pick_device(),
            progress=progress or NoProgress(),
            offload=settings.offload,
            activation_bytes=settings.activation_bytes,
        ),
    )


def block_pruner(recipe: PruneRecipe, context: RunContext) -> BlockPruner:
    """Make the walk of a recipe, on no model yet."""
    return BlockPruner(
        method=recipe.method,
        pattern=recipe.pattern,
        device=context.device,
        offload=context.offload,
        measure_errors=recipe.measure_error,
        order="sequential" if recipe.true_sequential else "block",
        target=recipe.dense_target,
        matching=recipe.reconstruction,
        budget=recipe.allocation,
        progress=context.progress,
        activation_bytes=context.activation_bytes,
        spill_folder=context.spill_folder,
        respect_zeros=recipe.keep_zeros,
        channels=recipe.row_weights,
        rules=recipe.rules,
        group=context.group,
    )


def check_calibrated(walk: BlockPruner, calibrated: bool) -> None:
    """Refuse a walk that reads inputs where there is nothing to make them of.

    Raises:
        ConfigError: see above.
    """
    if walk.reads_inputs and not calibrated:
        raise ConfigError(f"Method {walk.method.name} with these settings needs calibration text or token ids.")


def make_calibration_windows(
    loaded: LoadedModel,
    source: CalibrationMix | Tensor | None,
    samples: int,
    seqlen: int,
    seed: int,
    walk: BlockPruner,
) -> Windows | None:
    """Calibration windows that were given as token ids (windows, tokens), or are drawn; None of nothing.

    Raises:
        ConfigError, UnsupportedModel: see `LoadedModel.token_ids` and `LoadedModel.calibration`.
    """
    if source is None:
        return None
    if isinstance(source, Tensor):
        return loaded.token_ids(source)
    return loaded.calibration(source, samples, seqlen, seed, walk.device, walk.progress)


def run(loaded: LoadedModel, walk: BlockPruner, windows: Windows | None, seed: int | None = None) -> RunReport:
    """Prune a loaded model in place and report on it.

    Raises:
        ConfigError: when the pattern does not fit, windows are missing, or their ids are not the model's.
        UnsupportedModel, SolveFailed: see `BlockPruner.run`.
    """
    check_calibrated(walk, windows is not None)
    start = time.perf_counter()
    model, blocks = loaded.model, loaded.blocks()
    ruled = walk.rules.applied(model, blocks)
    walk.patterns = {**walk.patterns, **ruled.patterns}
    check_fit(ruled.blocks, walk.pattern, walk.patterns)
    if windows is not None:
        loaded.check_ids(windows)
    training = model.training
    try:
        walk.run(model.eval(), ruled.blocks, None if windows is None else windows.ids)
    finally:
        model.train(training)
    before = 0.0 if walk.resumable is None else walk.resumable.before
    return RunReport(
        model=loaded.name,
        architecture=type(model).__name__,
        method=walk.method.name,
        pattern=str(walk.pattern),
        overrides={rule: str(pattern) for rule, pattern in walk.rules.overrides.items()},
        dtype=dtype_name(blocks[0].sites[0].dtype),
        device=str(walk.device),
        calibration=None if windows is None else calibration_record(windows, seed),
        layers=walk.records,
        reconstructions=walk.matches,
        dense=ruled.dense(model, blocks, {record.name for record in walk.records}),
        seconds={**walk.seconds, "total": time.perf_counter() - start + before},
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(walk.device),
        versions=provenance(),
        notes=_notes(model, walk),
    )


def _notes(model: nn.Module, walk: BlockPruner) -> list[str]:
    notes = []
    if is_composite(model):
        notes.append(f"of {type(model).__name__} the text decoder was pruned, on text alone; all else is as it was.")
    if walk.target and any(record.expert is not None for record in walk.records):
        notes.append(_PRUNED_TARGET)
    if walk.respect_zeros:
        found = sum(record.zeros_before or 0 for record in walk.records)
        notes.append(f"{found:,} weights of the pruned layers were zero before, stay zero and are counted.")
    return notes


def write(
    loaded: LoadedModel,
    report: RunReport,
    out: Path,
    settings: PruneConfig | None = None,
    replaceable: str | None = None,
    journal: Journal | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Write model, tokenizer, report, page, card and settings to `out`, which appears whole or not at all.

    Args:
        replaceable: name of a marker file: a directory that holds it is replaced, and the new one holds it, too.
        journal: holds the pruned blocks of a model that is not in memory.
        group: processes that each write some of its files; the first one does all else.
    """
    start, group = time.perf_counter(), group or ProcessGroup()
    if not group.is_main:
        place = Path(group.broadcast_from_main(str))
        if loaded.store is not None and journal is not None:
            write_weight_files(loaded.store, loaded.blocks(), journal, place, first=group.rank, step=group.size)
        group.barrier()
        return
    with new_directory(out, replaceable) as folder:
        group.broadcast_from_main(lambda: str(folder.absolute()))
        if loaded.store is None:
            check_result(loaded.model, str(out))
            save_model(loaded.model, loaded.tokenizer, folder)
        else:
            assert journal is not None
            write_weight_files(loaded.store, loaded.blocks(), journal, folder, first=group.rank, step=group.size)
            save_without_weights(loaded.store, loaded.tokenizer, folder)
        group.barrier()
        report.add_seconds("save", time.perf_counter() - start)
        (folder / REPORT_NAME).write_text(report.to_json())
        page = publish_run(folder, report, out)
        (folder / "README.md").write_text(model_card(report, page))
        if replaceable is not None:
            (folder / replaceable).touch()
        if settings is not None:
            (folder / SETTINGS_NAME).write_text(settings.to_yaml())
