"""The command line: its commands, its version, and how it ends."""

from __future__ import annotations

import signal
import sys
from types import FrameType
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
from alps.distributed import alone
from alps.errors import AlpsError

app = typer.Typer(
    help="Prune large language models in one shot, and see what it did to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# Commands that several processes can run together.
_TOGETHER = ("prune", "eval")


class _Terminated(KeyboardInterrupt):
    """The system asks the program to end; it ends as at an interrupt."""


def run() -> None:
    """Run a command; every user error is one line on stderr and exit code 2, an interrupt 130, a termination 143."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except AlpsError as error:
        print(f"Error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns an interrupt into an exit of its own, and drops what it says.
        stop = _interrupt_behind(end)
        if stop is None:
            raise
        print(str(stop) or "Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(143 if isinstance(stop, _Terminated) else 130)


def _one_line(sentence: str) -> str:
    """A name in it may hold line breaks, or what a terminal takes for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)


def _interrupt_behind(end: BaseException | None) -> KeyboardInterrupt | None:
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    return end


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alps {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Prune large language models in one shot, and see what it did to them."""
    if not version and context.invoked_subcommand not in _TOGETHER:
        alone(str(context.invoked_subcommand))


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
