"""`alps shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alps.cli.console import console_output
from alps.cli.options import ConfigFile, DryRun, Model, Resume, config_options
from alps.core.launch import require_single_process
from alps.pruning.shrink_config import ShrinkConfig, load_shrink_config


@config_options(ShrinkConfig)
def shrink_command(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create for the smaller checkpoint.")],
    values: dict[str, Any],
    dry_run: DryRun = False,
    resume: Resume = False,
    config: ConfigFile = None,
) -> None:
    """Remove MLP channels, heads, blocks or experts from MODEL, and write a plain, smaller checkpoint OUT."""
    from alps.cli.tables import shrink_summary
    from alps.core.distributed import process_group
    from alps.pruning.shrink_job import plan_shrink, shrink_checkpoint

    if dry_run:
        require_single_process("shrink --dry-run")
    with process_group() as group, console_output(quiet=not group.is_main) as (console, progress):
        settings = load_shrink_config(config, {**values, "model": model})
        if dry_run:
            for line in plan_shrink(settings, out):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            return
        report = shrink_checkpoint(settings, out, progress, resume=resume, group=group)
        console.print(shrink_summary(report, out), soft_wrap=True)
