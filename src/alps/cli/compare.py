"""`alps compare`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown

from alps.cli.console import console_output
from alps.cli.options import ConfigFile, config_options
from alps.core.errors import ConfigError
from alps.evaluation.compare_config import CompareConfig, load_compare_config

_LOG = logging.getLogger("alps")


@config_options(CompareConfig)
def compare_command(
    values: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As MODEL of `alps prune`; may come from --config instead.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Directory for the results; an unfinished comparison in it is continued."),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Prune MODEL by several methods to several patterns, and measure each of the pruned models.

    After an interruption the same command continues behind the last finished run.
    """
    from alps.evaluation.compare import run_comparison
    from alps.reporting.compare_results import RESULTS_NAME
    from alps.reporting.markdown_tables import TABLE_NAME, summary
    from alps.reporting.publish import PAGE_NAME

    if out is None:
        # A single argument is OUT; the model is named in the file then.
        if model is None or config is None:
            raise ConfigError("Give MODEL and OUT; MODEL may be left out when --config names the model.")
        out, model = Path(model), None
    with console_output() as (console, progress):
        results = run_comparison(load_compare_config(config, {**values, "model": model}), out, progress)
        console.print(Markdown(summary(results)) if console.is_terminal else summary(results), soft_wrap=True)
        page = f", {PAGE_NAME}" if (out / PAGE_NAME).is_file() else ""
        _LOG.info(f"Written to {out}: {RESULTS_NAME}, {TABLE_NAME}{page}.")
