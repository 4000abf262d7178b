"""`alps eval` and `alps inspect`: measurements of a checkpoint, and counts of its zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alps.cli.console import console_output
from alps.cli.options import config_options
from alps.cli.tables import evaluation_table, inspection_tables, task_table
from alps.core.device import pick_device
from alps.core.distributed import process_group
from alps.core.json_text import to_json
from alps.core.memory import out_of_memory_as_error
from alps.core.settings import COMMAND_LINE, make_config
from alps.data.loaded_model import load
from alps.evaluation.api import evaluate
from alps.evaluation.evaluate_config import EvaluateConfig
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.models.load import check_architecture
from alps.reporting.card_metadata import add_results, read_card
from alps.reporting.records import EvaluationRecord, TaskRecord


@config_options(EvaluateConfig)
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=EvaluateConfig.model_fields["model"].description)],
    values: dict[str, Any],
) -> None:
    """Measure MODEL's perplexity on each text, and its score in each task: tables on stderr, JSON on stdout."""
    config = make_config(EvaluateConfig, {"model": model, **values}, COMMAND_LINE)
    config.check_needed()
    device = pick_device(config.device)
    for name in (model, config.reference):
        if name is not None:
            check_architecture(name)
    if config.card:
        read_card(Path(model))
    # Tasks are checked before the model is loaded.
    tasks = find_tasks(config.tasks, config.task_folder, config.limit) if "tasks" in config.model_fields_set else None
    errors, rows = Console(stderr=True), list[EvaluationRecord | TaskRecord]()
    with process_group() as group, console_output(quiet=not group.is_main) as (_, progress):
        loaded = load(model, config.dtype)
        if config.texts:
            reference = None if config.reference is None else load(config.reference, config.dtype)
            with out_of_memory_as_error("lower --seqlen, or use --dtype bfloat16 or --device cpu"):
                records = evaluate(
                    loaded,
                    config.texts,
                    reference=reference,
                    seqlen=config.seqlen,
                    windows=config.windows,
                    bos=config.bos,
                    device=config.device,
                    progress=progress,
                    group=group,
                )
            rows += records
            if group.is_main:
                errors.print(evaluation_table(records))
        if tasks is not None:
            with out_of_memory_as_error("lower --batch-size, or use --dtype bfloat16 or --device cpu"):
                device = group.device(config.device, device)
                scores = score_tasks(loaded, tasks, device, batch_size=config.batch_size, group=group)
            rows += scores
            if group.is_main:
                errors.print(task_table(scores))
    if group.is_main:
        if config.card:
            add_results(Path(model), rows)
        print(to_json([row.model_dump() for row in rows], indent=1))


def inspect_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory, pruned by any program.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count the zeros of every layer in DIR, check N:M groups, and list what is dense and why."""
    from alps.evaluation.inspect import inspect

    inspection = inspect(directory)
    if as_json:
        print(to_json({"sparsity": inspection.sparsity, **inspection.model_dump()}, indent=1))
        return
    for table in inspection_tables(inspection):
        Console().print(table, soft_wrap=True)
