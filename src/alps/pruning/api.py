"""Pruning from Python, with the settings of `alps prune`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from alps.checkpoints.atomic_io import check_target
from alps.checkpoints.safetensors_io import check_finite
from alps.core.errors import ConfigError, UnsupportedModel
from alps.core.progress import NoProgress, Progress
from alps.core.settings import ARGUMENTS, make_config
from alps.data.loaded_model import LoadedModel
from alps.data.mixture import CalibrationMix, load_calibration
from alps.inference.convert import packed_modules
from alps.models.memory_check import check_weights_in_memory, check_writable_weights, eager, unwrap
from alps.models.save import staged_side_files
from alps.pruning.config import PruneConfig
from alps.pruning.context import RunContext
from alps.pruning.job import prune_checkpoint
from alps.pruning.presets import PAPER, apply_preset
from alps.pruning.recipe import PruneRecipe
from alps.pruning.run import prune_model
from alps.pruning.run_inputs import make_calibration_windows
from alps.pruning.write import write
from alps.reporting.run_report import RunReport
from alps.solvers import Method, Refitted
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured


def prune(
    model: nn.Module | str | Path,
    *,
    sparsity: float | None = None,
    pattern: Pattern | str | None = None,
    overrides: Mapping[str, Pattern | str | float] | str | None = None,
    keep_dense: Sequence[str] | str = (),
    keep_zeros: bool = False,
    method: Method | str = "alps",
    effort: str = "normal",
    refit: bool = False,
    options: Mapping[str, Any] | None = None,
    preset: str = PAPER,
    true_sequential: bool | None = None,
    dense_target: float | None = None,
    allocation: Literal["uniform", "owl", "error", "sensitivity"] | None = None,
    row_weights: Literal["equal", "block-output"] | None = None,
    reconstruct_epochs: int | None = None,
    reconstruct_target: float | None = None,
    measure_error: bool = True,
    calibration: str | Path | Tensor = "c4",
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    activation_memory: float | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Prune a causal language model.

    A model given by name is pruned as by `alps prune`: one block in memory at a time, with a journal next to `out`, so
    that the same call continues an interrupted run. The settings are described in docs/reference/settings.md.

    Args:
        model: a model in memory, which is pruned in place, or what `alps prune` takes as MODEL.
        sparsity: share of the weights to remove from every linear layer; this or `pattern`.
        pattern: N:M as text, or a pattern object such as `Unstructured(0.7)` or `SemiStructured(2, 4)`.
        overrides: patterns of layers by name, with wildcards.
        keep_dense: names of layers to leave dense, with wildcards.
        keep_zeros: keep the zeros that the model already has, and count them.
        method: name of a method, or a method object, also of a class of your own (docs/how-to/own-method.md).
        effort: iterations of ALPS, if it is given by name.
        options: hyper-parameters of a method given by name.
        refit: compute the optimal weights on the method's mask.
        preset: defaults for the six settings from `true_sequential` to `reconstruct_target`, where they are None.
        true_sequential: prune the layers of a block one after the other.
        dense_target: share of the dense model's outputs in what a layer is fitted to.
        allocation: distribution of the zeros over the layers.
        row_weights: weight of each output channel in a layer's error.
        reconstruct_epochs: epochs of block reconstruction, after the layers of a block are pruned.
        reconstruct_target: share of the dense model's hidden states in its target.
        measure_error: measure the reconstruction error of every layer.
        calibration: text as in `alps prune`, or token ids of shape (windows, tokens). A model in memory needs its
            `tokenizer` for a text.
        samples: calibration windows to choose, unless `calibration` is token ids.
        seqlen: tokens in each of them.
        seed: of their choice.
        bos: begin every such window with the tokenizer's BOS token, for models that need it.
        device: device to compute on; `auto` is the first GPU, or the device of a model in memory.
        dtype: data type of the weights of a model given by name.
        offload: keep activations in CPU memory between blocks.
        activation_memory: GiB of activations to keep in memory; the others go to files.
        tokenizer: tokenizer of a model in memory; saved with it.
        out: directory to write; required for a model given by name.
        resume: fail when there is no unfinished run to continue.
        progress: receives every layer.

    Returns:
        The report of the run, as written to `report.json` in `out`.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: `out` is not written then. A model in memory may
            be left partly pruned by `SolveFailed`.
    """
    if not isinstance(method, str | Method):
        kind = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ConfigError(
            f"A method is a name or an object of a subclass of alps.solvers.Method, such as alps.Wanda(), not {kind}."
        )
    if isinstance(pattern, Unstructured | SemiStructured):
        if sparsity is not None:
            raise ConfigError("Give either a sparsity or a pattern, and not both.")
        sparsity, pattern = (pattern.sparsity, None) if isinstance(pattern, Unstructured) else (None, str(pattern))
    values: dict[str, Any] = {
        "model": str(model) if isinstance(model, str | Path) else _name(model),
        "sparsity": sparsity,
        "pattern": pattern,
        "overrides": overrides if isinstance(overrides, str | None) else _plain_overrides(overrides),
        "keep_dense": keep_dense if isinstance(keep_dense, str) else list(keep_dense),
        "keep_zeros": keep_zeros,
        "method": method if isinstance(method, str) else method.name,
        "effort": effort,
        "refit": refit,
        "options": None if options is None else dict(options),
        "preset": preset,
        "true_sequential": true_sequential,
        "dense_target": dense_target,
        "allocation": allocation,
        "row_weights": row_weights,
        "reconstruct_epochs": reconstruct_epochs,
        "reconstruct_target": reconstruct_target,
        "measure_error": measure_error,
        "calibration": None if isinstance(calibration, Tensor) else str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "activation_memory": activation_memory,
    }
    if isinstance(model, nn.Module):
        model = unwrap(model)
        _check_in_memory(model)
    elif not isinstance(model, str | Path):
        raise ConfigError(
            f"A {type(model).__name__} cannot be pruned: give a model of transformers, such as `.model` of what "
            "alps.load returns, or the name of a checkpoint."
        )
    config = _make_config(values, method)
    method_object = _method_object(method, config)
    progress = progress or NoProgress()
    if isinstance(model, nn.Module):
        recipe = config.resolve(method=method_object)
        with eager(model):
            return _prune_in_memory(model, tokenizer, calibration, config, recipe, out, progress)
    if out is None:
        raise ConfigError("A model given by name needs `out`, a directory to write: its pruned weights would be lost.")
    token_ids = calibration if isinstance(calibration, Tensor) else None
    return prune_checkpoint(config, Path(out), progress, resume=resume, method=method_object, token_ids=token_ids)


def _check_in_memory(model: nn.Module) -> None:
    """Refuse a model in memory whose weights cannot be pruned in place, before anything else is done."""
    if next(packed_modules(model), None) is not None:
        raise UnsupportedModel("The layers of the model are packed: prune the model before it is packed.")
    check_weights_in_memory(model)
    check_writable_weights(model)


def _prune_in_memory(
    model: nn.Module,
    tokenizer: Any,
    calibration: str | Path | Tensor,
    config: PruneConfig,
    recipe: PruneRecipe,
    out: str | Path | None,
    progress: Progress,
) -> RunReport:
    if out is not None:
        check_target(Path(out))
    start = time.perf_counter()
    check_finite(model.named_parameters(), config.model)
    loaded = LoadedModel(config.model, model, tokenizer)
    loaded.check_causal()
    seconds = time.perf_counter() - start
    device = next(model.parameters()).device if config.device == "auto" else config.pick_device()
    context = RunContext(
        device=device, progress=progress, offload=config.offload, activation_bytes=config.activation_bytes
    )
    source: Tensor | CalibrationMix | None = None
    if isinstance(calibration, Tensor):
        source = calibration
    elif recipe.reads_inputs:
        source = load_calibration(config.calibration, config.samples)
    windows = None if source is None else make_calibration_windows(loaded, source, config, context)
    seed = None if isinstance(calibration, Tensor) else config.seed
    if out is None:
        return prune_model(loaded, windows, recipe, context, seed=seed, load_seconds=seconds)
    with staged_side_files(loaded.writer, Path(out)) as side_files:
        report = prune_model(loaded, windows, recipe, context, seed=seed, load_seconds=seconds)
        return write(loaded, report, Path(out), side_files=side_files)


def _make_config(values: Mapping[str, Any], method: Method | str) -> PruneConfig:
    """Make the config; the preset's row weights depend on a method object, which a config does not hold."""
    explicit = {name: value for name, value in values.items() if value is not None}
    if not isinstance(method, str):
        explicit = apply_preset(explicit, semi_structured="pattern" in explicit, by_rows=method.by_rows)
    return make_config(PruneConfig, explicit, ARGUMENTS)


def _method_object(method: Method | str, config: PruneConfig) -> Method | None:
    if isinstance(method, str):
        return None
    if config.options or config.effort != "normal":
        raise ConfigError("`options` and `effort` are for a method given by name: set them on the method object.")
    return Refitted(method) if config.refit else method


def _plain_overrides(overrides: Mapping[str, Pattern | str | float]) -> dict[str, str | float]:
    """Return the patterns by rule as numbers and text."""
    plain: dict[str, str | float] = {}
    for rule, pattern in overrides.items():
        if isinstance(pattern, Unstructured):
            plain[rule] = pattern.sparsity
        else:
            plain[rule] = pattern if isinstance(pattern, str | float | int) else str(pattern)
    return plain


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__
