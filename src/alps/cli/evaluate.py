"""`alps eval` and `alps inspect`: measurements of a checkpoint, and counts of its zeros."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from alps.cli.options import config_options
from alps.core.json_text import to_json
from alps.core.settings import COMMAND_LINE, make_config
from alps.evaluation.evaluate_config import EvaluateConfig


@config_options(EvaluateConfig)
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=EvaluateConfig.model_fields["model"].description)],
    values: dict[str, Any],
) -> None:
    """Measure MODEL's perplexity on each text, and its score in each task: tables on stderr, JSON on stdout."""
    config = make_config(EvaluateConfig, {"model": model, **values}, COMMAND_LINE)
    from alps.cli.evaluate_run import measure_checkpoint

    measure_checkpoint(config)


def inspect_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory, pruned by any program.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count the zeros of every layer in DIR, check N:M groups, and list what is dense and why."""
    from alps.cli.tables import inspection_tables
    from alps.evaluation.inspect import inspect

    inspection = inspect(directory)
    if as_json:
        print(to_json({"sparsity": inspection.sparsity, **inspection.model_dump()}, indent=1))
        return
    for table in inspection_tables(inspection):
        Console().print(table, soft_wrap=True)
