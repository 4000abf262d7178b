"""`alps demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alps.cli.console import console_output
from alps.cli.tables import demo_table, prune_summary


def demo(
    out: Annotated[Path, typer.Option(help="Where the pruned model goes.")] = Path("alps-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Prune with ALPS alone.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Prune a real 135M-parameter LLaMA to 70 %, and compare methods; needs pip's package index once, no hub."""
    from alps.cli.demo_run import demo as run_demo

    with console_output() as (console, progress):
        rows, report = run_demo(out, quick, device, progress)
        console.print(demo_table(rows))
        console.print(prune_summary(report, out), soft_wrap=True)
