"""The command line: its commands, its version, and how it ends."""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from alps import __version__
from alps.core.errors import AlpsError

# Module of alps.cli, function, and the first line of its help. A command is imported when it is called: torch and
# transformers take seconds, which a list of commands, a version or a mistyped name need not wait for.
COMMANDS = {
    "prune": (
        "prune",
        "prune",
        "Prune MODEL and write an ordinary Hugging Face directory OUT, with report.json and a model card.",
    ),
    "eval": (
        "evaluate",
        "evaluate_command",
        "Perplexity of DIR on each text, and its score in each task: tables on stderr, JSON on stdout.",
    ),
    "inspect": (
        "evaluate",
        "inspect_command",
        "Sparsity by block and site, whether N:M groups hold, and what was left dense and why.",
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
        "Draw DIR/report.html anew from its JSON: tables and figures in one file, for any browser, without a network.",
    ),
    "pack": (
        "pack",
        "pack_command",
        "Store the checkpoint in DIR without its zeros; `alps unpack` gives it back, to the bit.",
    ),
    "unpack": (
        "pack",
        "unpack_command",
        "Write the ordinary, dense checkpoint that was packed, with every hash checked.",
    ),
    "generate": (
        "generate",
        "generate_command",
        "Continue a text with a packed or dense model: text to stdout as it comes, speed and memory to stderr.",
    ),
    "demo": (
        "demo",
        "demo",
        "Prune a real 135M-parameter LLaMA to 70 %, and compare methods; needs pip's package index once, no hub.",
    ),
}

# Commands that several processes can run together.
_TOGETHER = ("prune", "eval")


class _Commands(TyperGroup):
    """All commands by name and first line; the one that is called is imported."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=line) for name, (_, _, line) in COMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As of any group, of the command itself."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = imported(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Prune large language models in one shot, and see what it did to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def imported(name: str) -> Any:
    """The command of that name with its options, as typer makes it."""
    module, function, _ = COMMANDS[name]
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(importlib.import_module(f"alps.cli.{module}"), function))
    return get_command(single)


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
        from alps.core.distributed import require_single_process

        require_single_process(str(context.invoked_subcommand))
