"""The same job as the command line's, for Python: prune a model in memory or on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from alps.calibration.layer_order import Order
from alps.checkpoints.atomic_io import check_target
from alps.core.device import pick_device
from alps.core.errors import ConfigError, check_choice
from alps.core.progress import NoProgress, Progress
from alps.data.calibration import LoadedModel
from alps.data.mixture import load_calibration
from alps.models.finite_check import check_finite
from alps.pruning.config import make_reconstruction, split_names
from alps.pruning.context import RunContext
from alps.pruning.job import PruneJob, prune_job
from alps.pruning.layer_rules import Rules, parse_overrides
from alps.pruning.presets import PAPER, apply_preset
from alps.pruning.recipe import PruneRecipe
from alps.pruning.row_weights import RowWeights
from alps.pruning.run import block_pruner, make_calibration_windows, run, write
from alps.reporting.run_report import RunReport
from alps.solvers import Method, get_method
from alps.solvers.dense_target import parse_target
from alps.solvers.patterns import Pattern, SemiStructured, parse_pattern


def prune(
    model: nn.Module | str | Path,
    pattern: Pattern | str | float,
    method: Method | str = "alps",
    *,
    calibration: str | Path | Tensor | None = None,
    tokenizer: Any = None,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    measure_errors: bool = True,
    preset: str = PAPER,
    order: Order | None = None,
    target: str | float | None = None,
    match: int | None = None,
    match_target: str | float | None = None,
    budget: str | None = None,
    keep_dense: str | Sequence[str] = (),
    overrides: Mapping[str, Pattern | str | float] | None = None,
    respect_zeros: bool = False,
    channels: RowWeights | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Prune a causal language model.

    A model given by name is pruned as `alps prune` does it: one block in memory at a time, and finished blocks kept
    beside `out`, so that the same call goes on after the last of them when its process has died.

    Args:
        model: a model in memory, which is pruned in place, or what `alps prune` takes as MODEL.
        pattern: `Unstructured(0.7)`, `SemiStructured(2, 4)`, or 0.7, "2:4".
        method: a method object or its name.
        calibration: token ids (windows, tokens), or what `alps prune --calibration` takes (for a text, a model in
            memory needs its `tokenizer`). None only for a method that reads no inputs, with `measure_errors` off.
        tokenizer: of a model in memory; saved with it, too.
        samples, seqlen, seed: windows to draw unless `calibration` is token ids.
        out: directory to write; needed when `model` is a name, since the pruned model would be lost. It holds a page
            of figures, report.html, where the packages of the extra `report` are installed.
        device: where blocks are solved; `auto` is the first GPU, or the device a model in memory is on.
        dtype: of the weights when `model` is a name; `auto` keeps the checkpoint's.
        offload: keep activations on the CPU between blocks.
        measure_errors: see `alps.pruning.pipeline.BlockPruner`.
        preset, order, target, match, match_target, budget, channels, keep_dense, overrides, respect_zeros: as in
            `alps.pruning.config.PruneConfig`; None for one of the first seven is as the preset says.
        watcher: told after every site.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: one sentence each; nothing is written then but
            the finished blocks of a model given by name. A model in memory may be left partly pruned by `SolveFailed`.
    """
    wanted = parse_pattern(str(pattern)) if isinstance(pattern, str | float | int) else pattern
    chosen = get_method(method) if isinstance(method, str) else method
    said = {"order": order, "target": target, "match": match, "match_target": match_target, "budget": budget}
    said |= {"channels": channels, "preset": preset}
    given = {name: value for name, value in said.items() if value is not None}
    steps = apply_preset(given, isinstance(wanted, SemiStructured), chosen.by_rows)
    check_choice("Order", steps["order"], get_args(Order))
    recipe = PruneRecipe(
        method=chosen,
        pattern=wanted,
        rules=Rules(split_names(keep_dense), parse_overrides(overrides or {})),
        keep_zeros=respect_zeros,
        true_sequential=steps["order"] == "sequential",
        dense_target=parse_target(steps["target"]),
        allocation=steps["budget"],
        row_weights=steps["channels"],
        reconstruction=make_reconstruction(steps["match"], steps["match_target"]),
        measure_error=measure_errors,
    )
    if out is not None:
        check_target(Path(out))
    elif not isinstance(model, nn.Module):
        raise ConfigError("A model given by name needs `out`, a directory to write: its pruned weights would be lost.")
    context = RunContext(device=_place(model, device), progress=progress or NoProgress(), offload=offload)
    walk = block_pruner(recipe, context)
    source = calibration if calibration is None or torch.is_tensor(calibration) else str(calibration)
    if not isinstance(model, nn.Module):
        assert out is not None
        job = PruneJob(str(model), walk, source, samples, seqlen, seed, device, dtype)
        return prune_job(job, Path(out))
    start = time.perf_counter()
    loaded = _in_memory(model, tokenizer)
    seconds = time.perf_counter() - start
    drawn = load_calibration(source, samples) if isinstance(source, str) else source
    windows = make_calibration_windows(loaded, drawn, samples, seqlen, seed, walk)
    report = run(loaded, walk, windows, seed if isinstance(source, str) else None)
    report.add_seconds("load", seconds)
    if out is not None:
        write(loaded, report, Path(out))
    return report


def _place(model: nn.Module | str | Path, device: str) -> torch.device:
    if isinstance(model, nn.Module) and device == "auto":
        return next(model.parameters()).device
    return pick_device(device)


def _in_memory(model: nn.Module, tokenizer: Any) -> LoadedModel:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__
    check_finite(model.named_parameters(), name)
    return LoadedModel(name, model, tokenizer)
