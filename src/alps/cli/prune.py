"""`alps prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alps.cli.console import console_output
from alps.cli.options import ConfigFile, DryRun, Model, Resume, config_options
from alps.core.launch import require_single_process
from alps.pruning.config import PruneConfig, load_prune_config


@config_options(PruneConfig)
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create for the pruned checkpoint.")],
    values: dict[str, Any],
    dry_run: DryRun = False,
    resume: Resume = False,
    config: ConfigFile = None,
) -> None:
    """Prune MODEL and write an ordinary Hugging Face directory OUT, with report.json and a model card."""
    from alps.cli.tables import prune_summary
    from alps.core.distributed import process_group
    from alps.pruning.dry_run import forecast_summary
    from alps.pruning.job import estimate_run, prune_checkpoint

    if dry_run:
        require_single_process("prune --dry-run")
    with process_group() as group, console_output(quiet=not group.is_main) as (console, progress):
        settings = load_prune_config(config, {**values, "model": model})
        if dry_run:
            console.print(forecast_summary(estimate_run(settings, out)), soft_wrap=True, highlight=False, markup=False)
            return
        report = prune_checkpoint(settings, out, progress, resume=resume, group=group)
        console.print(prune_summary(report, out), soft_wrap=True)
