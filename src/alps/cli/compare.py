"""`alps compare`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown

from alps.cli.console import console_output
from alps.core.errors import ConfigError
from alps.evaluation.compare import compare
from alps.evaluation.compare_config import load_compare_config
from alps.pruning.presets import PRESETS
from alps.reporting.compare_results import RESULTS_NAME
from alps.reporting.markdown_tables import TABLE_NAME, summary
from alps.reporting.publish import PAGE_NAME
from alps.solvers import METHODS

_LOG = logging.getLogger("alps")


def compare_command(
    out: Annotated[Path, typer.Option(help="Directory for the results; one of the same comparison is gone on with.")],
    model: Annotated[
        str | None, typer.Argument(help="As MODEL of `alps prune`; may come from --config instead.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Of {', '.join([*METHODS, *PRESETS])}, separated by commas; settings of `alps prune` may "
            "follow each, as in wanda+refit or alps+target=0.4.  [default: magnitude,wanda,sparsegpt,dsnot,alps]"
        ),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Fractions of zeros, such as 0.5,0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M patterns, such as 2:4,4:8.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Calibrations to draw, for mean and deviation.  [default: 1]")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="As for `alps prune`.  [default: c4]")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.  [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each.  [default: 2048]")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="As for `alps eval`, several times.  [default: wikitext2 and c4]")
    ] = None,
    eval_seqlen: Annotated[int | None, typer.Option(help="Tokens in a window of a text.  [default: 2048]")] = None,
    windows: Annotated[int | None, typer.Option(help="Use only the first N windows of each text.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks, separated by commas; needs lm-eval.")] = None,
    task_data: Annotated[str | None, typer.Option(help="Folder of local items, TASK.jsonl each.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first N items of each task.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text that every model continues, several times if wanted.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.  [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.  [default: auto]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these settings; flags override it.")] = None,
) -> None:
    """Prune MODEL by every method to every pattern from the same weights, and measure all of them alike.

    Stopped at any moment, the same command goes on after the last finished run.
    """
    given: dict[str, Any] = {
        "model": model,
        "methods": _words(methods),
        "sparsity": _numbers(sparsity),
        "pattern": _words(pattern),
        "seeds": seeds,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "texts": text or None,
        "eval_seqlen": eval_seqlen,
        "windows": windows,
        "tasks": _words(tasks),
        "task_data": task_data,
        "limit": limit,
        "prompts": prompt or None,
        "device": device,
        "dtype": dtype,
    }
    with console_output() as (console, progress):
        results = compare(load_compare_config(config, given), out, progress)
        console.print(Markdown(summary(results)) if console.is_terminal else summary(results), soft_wrap=True)
        page = f", {PAGE_NAME}" if (out / PAGE_NAME).is_file() else ""
        _LOG.info(f"Written to {out}: {RESULTS_NAME}, {TABLE_NAME}{page}.")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None) -> list[float] | None:
    words = _words(text)
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError:
        raise ConfigError(f"Sparsities '{text}' are not numbers: write them as 0.5,0.7.") from None
