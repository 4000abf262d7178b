"""Where a command prints."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from alps.core.progress import ConsoleWatcher


def consoles(quiet: bool = False) -> tuple[Console, ConsoleWatcher, Callable[[str], None]]:
    """Results go to stdout; progress and remarks to stderr, so that output can be piped. `quiet` drops all of it."""
    errors = Console(stderr=True, quiet=quiet)
    return (
        Console(quiet=quiet),
        ConsoleWatcher(errors),
        lambda line: errors.print(line, markup=False, highlight=False, soft_wrap=True),
    )
