"""Prune a model that is open, and report on it."""

from __future__ import annotations

import time

from torch import nn

from alps.core.errors import ConfigError
from alps.core.memory import peak_device_bytes, peak_host_bytes
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel
from alps.data.windows import Windows
from alps.models.auto_class import is_composite
from alps.pruning.context import RunContext
from alps.pruning.pipeline import BlockResults, prune_blocks
from alps.pruning.recipe import PruneRecipe
from alps.reporting.records import calibration_record
from alps.reporting.run_report import RunReport

_EXPERTS_WITHOUT_TARGET = (
    "the experts were pruned without the dense target: a router may send them other tokens in the pruned model than in "
    "the dense one, so that their inputs cannot be compared."
)


def check_calibrated(recipe: PruneRecipe, calibrated: bool) -> None:
    """Refuse a recipe that reads inputs when there is no calibration text.

    Args:
        recipe: of the run.
        calibrated: True if there are calibration windows, or a source of them.

    Raises:
        ConfigError: see above.
    """
    if recipe.reads_inputs and not calibrated:
        raise ConfigError(f"Method {recipe.method.name} with these settings needs calibration text or token ids.")


def prune_model(
    loaded: LoadedModel,
    windows: Windows | None,
    recipe: PruneRecipe,
    context: RunContext,
    *,
    seed: int | None = None,
    load_seconds: float = 0.0,
) -> RunReport:
    """Prune a loaded model in place and report on it.

    Args:
        loaded: model to prune.
        windows: calibration windows; None only for a recipe that reads no inputs.
        recipe: method, pattern and options.
        context: device, ranks, journal.
        seed: that drew the windows, for the report; None if the caller made them.
        load_seconds: wall time of loading the model, for the report.

    Raises:
        ConfigError: when the pattern does not fit, windows are missing, or their ids are not the model's.
        UnsupportedModel, SolveFailed: see `prune_blocks`.
    """
    check_calibrated(recipe, windows is not None)
    start = time.perf_counter()
    model, blocks = loaded.model, loaded.blocks()
    if windows is not None:
        loaded.check_ids(windows)
    training = model.training
    try:
        results = prune_blocks(model.eval(), blocks, None if windows is None else windows.ids, recipe, context)
    finally:
        model.train(training)
    total = time.perf_counter() - start + results.earlier_seconds
    report = RunReport(
        model=loaded.name,
        architecture=type(model).__name__,
        method=recipe.method.name,
        pattern=str(recipe.pattern),
        overrides={rule: str(pattern) for rule, pattern in recipe.rules.overrides.items()},
        dtype=dtype_name(next(site.dtype for block in blocks for site in block.sites)),
        device=str(context.device),
        calibration=None if windows is None else calibration_record(windows, seed),
        layers=results.layers,
        reconstructions=results.reconstructions,
        dense=results.dense,
        seconds={**results.seconds, "total": total},
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(context.device),
        versions=provenance(),
        notes=_notes(model, recipe, results),
    )
    return report.with_seconds("load", load_seconds) if load_seconds else report


def _notes(model: nn.Module, recipe: PruneRecipe, results: BlockResults) -> list[str]:
    notes = []
    if is_composite(model):
        notes.append(
            f"of {type(model).__name__} the text decoder was pruned, on text alone; all other parts are unchanged."
        )
    if recipe.dense_target and any(layer.expert is not None for layer in results.layers):
        notes.append(_EXPERTS_WITHOUT_TARGET)
    if recipe.keep_zeros:
        zeros = sum(layer.zeros_before or 0 for layer in results.layers)
        notes.append(f"{zeros:,} weights of the pruned layers were zero before, stay zero and are counted.")
    return notes
