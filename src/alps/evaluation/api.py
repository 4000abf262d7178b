"""Measurements from Python: perplexity, divergence and tasks of a model, and comparisons of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alps.core.device import pick_device
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import ConfigError
from alps.core.progress import NoProgress, Progress
from alps.core.settings import ARGUMENTS, make_config
from alps.data.loaded_model import LoadedModel, load
from alps.evaluation.compare import run_comparison
from alps.evaluation.compare_config import CompareConfig
from alps.evaluation.kl_divergence import measure_divergence
from alps.evaluation.perplexity import measure_perplexity
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.models.load import check_architecture
from alps.models.memory_check import check_weights_in_memory, unwrap
from alps.reporting.card_metadata import add_results, read_card
from alps.reporting.compare_results import Result
from alps.reporting.markdown_tables import summary
from alps.reporting.records import EvaluationRecord, TaskRecord


class ComparisonResults(list[Result]):
    """Results of a comparison; a notebook shows them as a table."""

    def __repr__(self) -> str:
        return summary(self)


def evaluate(
    model: LoadedModel | str | Path,
    texts: str | Path | Sequence[str | Path],
    *,
    reference: LoadedModel | str | Path | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    bos: bool = False,
    card: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[EvaluationRecord]:
    """Measure the perplexity of a model on each text; see `alps.evaluation.perplexity` for the convention.

    Args:
        model: what `alps.load` returns or takes, or a model in memory as `LoadedModel(name, model, tokenizer)`.
        texts: one text or several: text or .jsonl files, `wikitext2:FILE`, or names of standard texts, as in
            `alps eval --text`.
        reference: the dense model, measured on the same windows. Every record is then a `ComparisonRecord`, with the
            divergence from it; see `alps.evaluation.kl_divergence`.
        seqlen: tokens per window.
        windows: use only the first windows of each text; None for all.
        bos: begin every window with the tokenizer's BOS token, for models that need it.
        card: add the figures to the metadata of the directory's README.md, in the form that hubs read.
        device: device to compute on; `auto` is the first GPU if any.
        dtype: data type of the weights of models given by name.
        progress: receives every batch.
        group: ranks that share the windows, each called with the same arguments.

    Raises:
        ConfigError: for a text that is missing or too short, windows longer than the model takes, a model without a
            tokenizer, or a reference with another tokenizer or vocabulary.
        CheckpointError: for a `card` that cannot be read.
    """
    if card:
        read_card(_directory(model))
    for source in (model, reference):
        if isinstance(source, str | Path):
            check_architecture(source)
    loaded, torch_device = _load(model, dtype), group.device(device, pick_device(device))
    names = [texts] if isinstance(texts, str | Path) else texts
    cut = [loaded.evaluation(str(text), seqlen, windows, bos=bos) for text in names]
    settings: dict[str, Any] = {"device": torch_device, "progress": progress, "group": group}
    if reference is None:
        records: list[EvaluationRecord] = [
            measure_perplexity(loaded.model, part, name=loaded.name, **settings) for part in cut
        ]
    else:
        dense = _load(reference, dtype)
        for part, text in zip(cut, names, strict=True):
            dense.check_same(part, str(text), windows)
        pair = (loaded.name, dense.name)
        records = [measure_divergence(loaded.model, dense.model, part, names=pair, **settings) for part in cut]
    if card and group.is_main:
        add_results(_directory(model), records)
    return records


def evaluate_tasks(
    model: LoadedModel | str | Path,
    tasks: Sequence[str],
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    card: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[TaskRecord]:
    """Measure zero-shot accuracies of a model by lm-eval (`pip install lm-eval accelerate`).

    Args:
        model: as in `evaluate`.
        tasks: names; with `task_data` those of `alps.evaluation.local_tasks.DEFINITIONS`, else lm-eval's own.
        task_data: folder of local files, NAME.jsonl for every task; nothing is then fetched.
        limit: score only the first items of each task; None for all.
        batch_size: sequences in a forward.
        card: as in `evaluate`.
        device: as in `evaluate`.
        dtype: as in `evaluate`.
        group: ranks that share the requests, each called with the same arguments.

    Raises:
        ConfigError: for an unknown task, data that cannot be used or fetched, or without lm-eval or a tokenizer.
        CheckpointError: for a `card` that cannot be read.
    """
    if card:
        read_card(_directory(model))
    torch_device = pick_device(device)
    if isinstance(model, str | Path):
        check_architecture(model)
    task_set = find_tasks(tasks, None if task_data is None else Path(task_data), limit)
    device_of_rank = group.device(device, torch_device)
    records = score_tasks(_load(model, dtype), task_set, device_of_rank, batch_size=batch_size, group=group)
    if card and group.is_main:
        add_results(_directory(model), records)
    return records


def compare(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = ("magnitude", "wanda", "sparsegpt", "dsnot", "alps"),
    sparsity: Sequence[float] = (),
    pattern: Sequence[str] = (),
    seeds: int = 1,
    calibration: str | Path = "c4",
    samples: int = 128,
    seqlen: int = 2048,
    bos: bool = False,
    texts: Sequence[str | Path] = ("wikitext2", "c4"),
    eval_seqlen: int = 2048,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    prompts: Sequence[str] = (),
    prompt_tokens: int = 48,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> ComparisonResults:
    """Prune a model by several methods to several patterns, and measure each of the pruned models.

    An unfinished comparison in `out` is continued behind its last finished run.

    Args:
        model: what `alps prune` takes as MODEL.
        out: directory for the results.
        methods: methods and presets, with settings of `alps.prune` after plus signs: `alps+dense_target=0.4`.
        sparsity: shares of the weights to remove.
        pattern: N:M patterns; with the shares at least one.
        seeds: number of calibration draws.
        calibration: text, as in `alps.prune`.
        samples: calibration windows.
        seqlen: tokens in each of them.
        bos: begin every window with the tokenizer's BOS token, those of the texts as well.
        texts: for perplexity and divergence, as in `alps.evaluate`.
        eval_seqlen: tokens per window of a text.
        windows: use only the first windows of each text; None for all.
        tasks: zero-shot tasks, as in `alps.evaluate_tasks`.
        task_data: folder of local items, as there.
        limit: score only the first items of each task; None for all.
        prompts: that every model continues.
        prompt_tokens: length of the continuations.
        device: as in `alps.prune`.
        dtype: as in `alps.prune`.
        progress: receives the steps of every run.

    Returns:
        All results, those of the dense model first.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: nothing was run.
        SolveFailed: some runs failed; all others are done.
    """
    values = {
        "model": str(model),
        "methods": list(methods),
        "sparsity": list(sparsity),
        "pattern": list(pattern),
        "seeds": seeds,
        "calibration": str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "bos": bos,
        "texts": [str(text) for text in texts],
        "eval_seqlen": eval_seqlen,
        "windows": windows,
        "tasks": list(tasks),
        "task_data": None if task_data is None else str(task_data),
        "limit": limit,
        "prompts": list(prompts),
        "prompt_tokens": prompt_tokens,
        "device": device,
        "dtype": dtype,
    }
    config = make_config(CompareConfig, values, ARGUMENTS)
    return ComparisonResults(run_comparison(config, Path(out), progress or NoProgress()))


def _directory(model: LoadedModel | str | Path) -> Path:
    return Path(model.name if isinstance(model, LoadedModel) else model)


def _load(model: LoadedModel | str | Path, dtype: str) -> LoadedModel:
    if isinstance(model, str | Path):
        loaded = load(model, dtype)
    elif isinstance(model, LoadedModel):
        inner = unwrap(model.model)
        check_weights_in_memory(inner)
        loaded = replace(model, model=inner)
    else:
        raise ConfigError(
            f"A {type(model).__name__} cannot be measured without its tokenizer: give the name of a checkpoint, or "
            "alps.LoadedModel(name, model, tokenizer)."
        )
    loaded.check_causal()
    return loaded
