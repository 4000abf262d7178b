"""Where a command prints."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from alps.core.progress import ConsoleProgress


def consoles(quiet: bool = False) -> tuple[Console, ConsoleProgress, Callable[[str], None]]:
    """Results go to stdout; progress and remarks to stderr, so that output can be piped. `quiet` drops all of it."""
    errors = Console(stderr=True, quiet=quiet)
    return (
        Console(quiet=quiet),
        ConsoleProgress(errors),
        lambda line: errors.print(line, markup=False, highlight=False, soft_wrap=True),
    )
