"""`alps report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alps.cli.console import console_output


def report_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory written by `alps compare` or `alps prune`.")
    ],
) -> None:
    """Draw DIR/report.html from its JSON: tables and figures in one file, for any browser, without a network."""
    from alps.reporting.publish import rebuild_page

    with console_output() as (console, _):
        console.print(f"Written to {rebuild_page(directory)}.", markup=False, highlight=False, soft_wrap=True)
