"""The same job as the command line's, for Python: prune a model in memory or on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alps.budgets import check_budget, check_fit
from alps.card import model_card
from alps.checkpoints.directory import check_target, new_directory
from alps.checkpoints.journal import Journal
from alps.config import SETTINGS_NAME, PruneSettings, parse_target, split_names
from alps.data.mix import load_calibration
from alps.data.windows import Windows
from alps.distributed import Group
from alps.errors import ConfigError
from alps.loaded import Loaded, load
from alps.matching import Matching
from alps.models.classes import is_composite
from alps.models.finite import check_finite, check_result
from alps.models.order import Order
from alps.models.save import save_beside, save_model, write_files
from alps.presets import PAPER, preset_steps
from alps.progress import Silent, Watcher
from alps.published import publish_run
from alps.records import calibration_record
from alps.report import REPORT_NAME, RunReport
from alps.rules import Rules, parse_overrides
from alps.runtime import peak_device_bytes, peak_host_bytes, pick_device, provenance
from alps.solvers import Method, get_method
from alps.solvers.pattern import Pattern, SemiStructured, parse_pattern
from alps.walk import Walk

_PRUNED_TARGET = (
    "the experts were pruned with --target pruned: a router may send them other tokens in the pruned model than in the "
    "dense one, so that their inputs cannot be compared."
)


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
    budget: str | None = None,
    keep_dense: str | Sequence[str] = (),
    overrides: Mapping[str, Pattern | str | float] | None = None,
    respect_zeros: bool = False,
    watcher: Watcher | None = None,
) -> RunReport:
    """Prune a causal language model.

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
        measure_errors: see `alps.walk.Walk`.
        preset, order, target, match, budget, keep_dense, overrides, respect_zeros: as in `alps.config.PruneSettings`;
            None is as the preset says.
        watcher: told after every site.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: one sentence each; nothing is written then.
            A model in memory may be left partly pruned by `SolveFailed`.
    """
    wanted = parse_pattern(str(pattern)) if isinstance(pattern, str | float | int) else pattern
    given = {"order": order, "target": target, "match": match, "budget": budget}
    steps = preset_steps(preset, isinstance(wanted, SemiStructured))
    steps.update((name, value) for name, value in given.items() if value is not None)
    share = parse_target(steps["target"])
    check_budget(steps["budget"], wanted)
    chosen = get_method(method) if isinstance(method, str) else method
    if out is not None:
        check_target(Path(out))
    elif not isinstance(model, nn.Module):
        raise ConfigError("A model given by name needs `out`, a directory to write: its pruned weights would be lost.")
    if isinstance(model, nn.Module) and device == "auto":
        place = next(model.parameters()).device
    else:
        place = pick_device(device)
    start = time.perf_counter()
    loaded = _in_memory(model, tokenizer) if isinstance(model, nn.Module) else load(str(model), dtype)
    seconds = time.perf_counter() - start
    windows, drawn = None, isinstance(calibration, str | Path)
    if isinstance(calibration, Tensor):
        windows = loaded.token_ids(calibration)
    elif calibration is not None:
        source = load_calibration(str(calibration), samples)
        windows = loaded.calibration(source, samples, seqlen, seed, place, watcher)
    matching = Matching(epochs=steps["match"]) if steps["match"] else None
    walk = Walk(chosen, wanted, place, offload, measure_errors, steps["order"], share, matching, steps["budget"])
    walk.watcher, walk.rules = watcher or Silent(), Rules(split_names(keep_dense), parse_overrides(overrides or {}))
    walk.respect_zeros = respect_zeros
    report = run(loaded, walk, windows, seed if drawn else None)
    report.add_seconds("load", seconds)
    if out is not None:
        write(loaded, report, Path(out))
    return report


def _in_memory(model: nn.Module, tokenizer: Any) -> Loaded:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__
    check_finite(model.named_parameters(), name)
    return Loaded(name, model, tokenizer)


def build_walk(settings: PruneSettings, watcher: Watcher | None = None) -> Walk:
    """The walk that settings ask for, on no model yet.

    Raises:
        ConfigError: for settings that contradict each other or do not exist, or a device that is not here.
    """
    pattern, method = settings.build_pattern(), settings.build_method()
    check_budget(settings.budget, pattern)
    steps = (settings.order, settings.target_share(), settings.matching(), settings.budget)
    walk = Walk(method, pattern, settings.place(), settings.offload, settings.errors, *steps)
    walk.watcher, walk.rules, walk.respect_zeros = watcher or Silent(), settings.rules(), settings.respect_zeros
    if settings.activation_memory is not None:
        walk.activation_bytes = int(settings.activation_memory * 2**30)
    return walk


def run(loaded: Loaded, walk: Walk, windows: Windows | None, seed: int | None = None) -> RunReport:
    """Prune a loaded model in place and report on it.

    Raises:
        ConfigError: when the pattern does not fit, windows are missing, or their ids are not the model's.
        UnsupportedModel, SolveFailed: see `Walk.run`.
    """
    if windows is None and walk.reads_inputs:
        raise ConfigError(f"Method {walk.method.name} with these settings needs calibration text or token ids.")
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
        dtype=str(blocks[0].sites[0].dtype).removeprefix("torch."),
        device=str(walk.device),
        calibration=None if windows is None else calibration_record(windows, seed),
        sites=walk.records,
        matches=walk.matches,
        dense=ruled.dense(model, blocks, {record.name for record in walk.records}),
        seconds={**walk.seconds, "total": time.perf_counter() - start + before},
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(walk.device),
        versions=provenance(),
        notes=_notes(model, walk),
    )


def _notes(model: nn.Module, walk: Walk) -> list[str]:
    notes = []
    if is_composite(model):
        notes.append(f"of {type(model).__name__} the text decoder was pruned, on text alone; all else is as it was.")
    if walk.target and any(record.expert is not None for record in walk.records):
        notes.append(_PRUNED_TARGET)
    if walk.respect_zeros:
        found = sum(record.found_zeros or 0 for record in walk.records)
        notes.append(f"{found:,} weights of the pruned layers were zero before, stay zero and are counted.")
    return notes


def write(
    loaded: Loaded,
    report: RunReport,
    out: Path,
    settings: PruneSettings | None = None,
    replaceable: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    journal: Journal | None = None,
    group: Group | None = None,
) -> None:
    """Write model, tokenizer, report, page, card and settings to `out`, which appears whole or not at all.

    Args:
        replaceable: name of a marker file: a directory that holds it is replaced, and the new one holds it, too.
        tell: is given a line where the page is left out.
        journal: holds the pruned blocks of a model that is not in memory.
        group: processes that each write some of its files; the first one does all else.
    """
    start, group = time.perf_counter(), group or Group()
    if not group.leads:
        place = Path(group.first(str))
        if loaded.store is not None and journal is not None:
            write_files(loaded.store, loaded.blocks(), journal, place, group.rank, group.size)
        group.wait()
        return
    with new_directory(out, replaceable) as folder:
        group.first(lambda: str(folder.absolute()))
        if loaded.store is None:
            check_result(loaded.model, str(out))
            save_model(loaded.model, loaded.tokenizer, folder)
        else:
            assert journal is not None
            write_files(loaded.store, loaded.blocks(), journal, folder, group.rank, group.size)
            save_beside(loaded.store, loaded.tokenizer, folder)
        group.wait()
        report.add_seconds("save", time.perf_counter() - start)
        (folder / REPORT_NAME).write_text(report.to_json())
        page = publish_run(folder, report, tell, out)
        (folder / "README.md").write_text(model_card(report, page))
        if replaceable is not None:
            (folder / replaceable).touch()
        if settings is not None:
            (folder / SETTINGS_NAME).write_text(settings.to_yaml())
