"""The command line: its commands, its version, and how it ends."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from alps import __version__
from alps.commands.compare import compare_command
from alps.commands.demo import demo
from alps.commands.generate import generate_command
from alps.commands.measure import evaluate_command, inspect_command
from alps.commands.pack import pack_command, unpack_command
from alps.commands.prune import prune
from alps.commands.report import report_command
from alps.commands.train import match_command, recover
from alps.errors import AlpsError

app = typer.Typer(
    help="Prune large language models in one shot, and see what it did to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """Run a command; every user error is one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        app()
    except AlpsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alps {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Prune large language models in one shot, and see what it did to them."""


app.command()(prune)
app.command("eval")(evaluate_command)
app.command("inspect")(inspect_command)
app.command()(recover)
app.command("match")(match_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("pack")(pack_command)
app.command("unpack")(unpack_command)
app.command("generate")(generate_command)
app.command()(demo)
