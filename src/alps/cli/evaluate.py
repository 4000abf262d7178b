"""`alps eval` and `alps inspect`: what a checkpoint is worth, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alps.cli.console import console_output
from alps.cli.tables import evaluation_table, inspection_tables, task_table
from alps.core.device import pick_device
from alps.core.distributed import process_group
from alps.core.errors import ConfigError
from alps.core.memory import out_of_memory_as_error
from alps.data.calibration import load
from alps.evaluation.api import evaluate
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.reporting.records import EvaluationRecord, TaskRecord


def evaluate_command(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint, as MODEL of `alps prune`, or a packed one.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text or .jsonl file, wikitext2:FILE for a raw WikiText-2 file, or wikitext2, c4, ptb, "
            "python-docs. May be given several times."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The dense checkpoint: how far DIR's predictions on the texts are from its.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only the first N windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks, separated by commas, e.g. piqa,arc_easy; needs lm-eval.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of local items, TASK.jsonl each.  [default: lm-eval's, from the hub]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N items of each task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a forward of a task.  [default: 8]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Perplexity of DIR on each text, and its score in each task: tables on stderr, JSON on stdout."""
    _check_needed("--text", text, {"--reference": reference, "--windows": windows})
    _check_needed("--tasks", tasks, {"--task-data": task_data, "--limit": limit, "--batch-size": batch_size})
    if not text and tasks is None:
        raise ConfigError("There is nothing to measure: give --text, --tasks or both.")
    errors, rows = Console(stderr=True), list[EvaluationRecord | TaskRecord]()
    place = pick_device(device)
    wanted = None if tasks is None else find_tasks(tasks.split(","), task_data, limit)
    with process_group() as group, console_output(quiet=not group.is_main) as (_, progress):
        loaded = load(directory, dtype)
        if text:
            dense = None if reference is None else load(reference, dtype)
            with out_of_memory_as_error("lower --seqlen, or use --dtype bfloat16 or --device cpu"):
                found = evaluate(
                    loaded,
                    text,
                    reference=dense,
                    seqlen=seqlen,
                    windows=windows,
                    device=device,
                    progress=progress,
                    group=group,
                )
            rows += found
            if group.is_main:
                errors.print(evaluation_table(found))
        if wanted is not None:
            with out_of_memory_as_error("lower --batch-size, or use --dtype bfloat16 or --device cpu"):
                scores = score_tasks(
                    loaded, wanted, group.device(device, place), batch_size=batch_size or 8, group=group
                )
            rows += scores
            if group.is_main:
                errors.print(task_table(scores))
    if group.is_main:
        print(json.dumps([row.model_dump() for row in rows], indent=1))


def _check_needed(option: str, value: object, given: dict[str, object]) -> None:
    """Refuse options that would have no effect."""
    for name, used in given.items():
        if used is not None and not value:
            raise ConfigError(f"{name} has no effect without {option}: give {option} too, or leave {name} out.")


def inspect_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory, pruned by anything.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Sparsity by block and site, whether N:M groups hold, and what was left dense and why."""
    from alps.evaluation.inspect import inspect

    findings = inspect(directory)
    if as_json:
        print(json.dumps({"sparsity": findings.sparsity, **findings.model_dump()}, indent=1))
        return
    for table in inspection_tables(findings):
        Console().print(table, soft_wrap=True)
