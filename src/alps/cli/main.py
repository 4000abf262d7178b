"""The command line: commands, version, exit codes."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from alps import __version__
from alps.cli.help_text import HelpCommand, print_help
from alps.core.cpu_load import is_busy
from alps.core.errors import AlpsError
from alps.core.launch import require_single_process
from alps.core.openmp import openmp_settings

# Module of alps.cli, function, and first line of the help of every command. A command is imported when it is called,
# because torch and transformers take seconds, and a list of commands or a version does not need them.
COMMANDS = {
    "prune": (
        "prune",
        "prune",
        "Prune MODEL and write an ordinary Hugging Face directory OUT, with report.json and a model card.",
    ),
    "shrink": (
        "shrink",
        "shrink_command",
        "Remove MLP channels, heads, blocks or experts from MODEL, and write a plain, smaller checkpoint OUT.",
    ),
    "eval": (
        "evaluate",
        "evaluate_command",
        "Measure MODEL's perplexity on each text, and its score in each task: tables on stderr, JSON on stdout.",
    ),
    "inspect": (
        "evaluate",
        "inspect_command",
        "Count the zeros of every layer in DIR, check N:M groups, and list what is dense and why.",
    ),
    "distill": (
        "distill",
        "distill_command",
        "Train the kept weights of PRUNED towards DENSE by distillation, and write OUT; zeros stay zero. Not one-shot.",
    ),
    "reconstruct": (
        "distill",
        "reconstruct_command",
        "Tune the kept weights of PRUNED, block by block, to DENSE's block outputs, and write OUT; zeros stay zero.",
    ),
    "compare": (
        "compare",
        "compare_command",
        "Prune MODEL by several methods to several patterns, and measure each of the pruned models.",
    ),
    "report": (
        "report",
        "report_command",
        "Draw DIR/report.html from its JSON: tables and figures in one file, for any browser, without a network.",
    ),
    "pack": (
        "pack",
        "pack_command",
        "Store the checkpoint in DIR without its zeros; `alps unpack` restores it to the bit.",
    ),
    "unpack": (
        "pack",
        "unpack_command",
        "Restore the ordinary, dense checkpoint from PACKED, and check every hash.",
    ),
    "generate": (
        "generate",
        "generate_command",
        "Continue a text with a packed or dense model: text to stdout as it comes, speed and memory to stderr.",
    ),
    "demo": (
        "demo",
        "demo",
        "Prune a real LLaMA of 135M parameters to 70 %, and compare methods; it is fetched from pip's index once.",
    ),
}

# Commands that several processes can run together.
_DISTRIBUTED_COMMANDS = ("prune", "shrink", "eval")


class _Commands(TyperGroup):
    """Group that lists all commands without importing them, and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=line) for name, (_, _, line) in COMMANDS.items()})

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the list of commands on stdout, in the width of the terminal."""
        print_help(self, ctx, {name: line for name, (_, _, line) in COMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is called, and resolve it.

        The settings of OpenMP are put into the environment first: torch reads them when a command imports it, and child
        processes inherit them.
        """
        if args and args[0] in COMMANDS:
            # Neither a help text nor a completion computes, and the load of the machine takes time to measure.
            if not ctx.resilient_parsing and "--help" not in args:
                os.environ.update(openmp_settings(os.environ, is_busy))
            self.commands[args[0]] = import_command(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Prune large language models in one shot, and measure the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def import_command(name: str) -> Any:
    """Import a command with its options."""
    module, function, _ = COMMANDS[name]
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, cls=HelpCommand)(getattr(importlib.import_module(f"alps.cli.{module}"), function))
    return get_command(single)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like an interrupt."""


def run() -> None:
    """Run a command.

    A user error is one line on stderr and exit code 2. The exit code is 130 after an interrupt, and 143 after SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except AlpsError as error:
        print(f"Error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns an interrupt into its own exit, without the message.
        stop = _interrupt_behind(end)
        if stop is None:
            raise
        print(str(stop) or "Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(143 if isinstance(stop, _Terminated) else 130)


def _one_line(sentence: str) -> str:
    """Escape line breaks and control characters, which names of files may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)


def _interrupt_behind(end: BaseException | None) -> KeyboardInterrupt | None:
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    return end


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _print_version(requested: bool) -> None:
    if requested:
        print(f"alps {__version__}")
        # From the metadata: importing the libraries takes seconds.
        libraries = ", ".join(f"{name} {_installed_version(name)}" for name in ("torch", "transformers", "safetensors"))
        print(f"{libraries}; Python {platform.python_version()}, {platform.platform()}")
        raise typer.Exit


def _installed_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Prune large language models in one shot, and measure the result."""
    if not version and context.invoked_subcommand not in _DISTRIBUTED_COMMANDS:
        require_single_process(str(context.invoked_subcommand))
