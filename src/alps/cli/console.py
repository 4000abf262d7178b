"""Output of a command: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from alps.core.cpu_count import ranks_on_host
from alps.core.cpu_load import CpuContention
from alps.core.progress import ConsoleProgress


class _ConsoleHandler(logging.Handler):
    """Print log messages as plain lines, above the progress bar where there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def cpu_contention() -> CpuContention:
    """Return the finder of other programs that take the CPUs from this command."""
    return CpuContention(_count_threads)


def _count_threads() -> int:
    """Return the number of threads with which all ranks on this host compute."""
    # Not imported above: a command that computes has imported it, and the others do not need it.
    import torch

    return torch.get_num_threads() * ranks_on_host(os.environ)


@contextmanager
def console_output(quiet: bool = False) -> Iterator[tuple[Console, ConsoleProgress]]:
    """Show the messages of the `alps` logger on stderr while a command runs.

    Args:
        quiet: print nothing, as on ranks other than the main one.

    Yields:
        The console of the results, on stdout, and the progress display, on stderr; output can thus be piped.
    """
    errors = Console(stderr=True, quiet=quiet)
    logger, handler = logging.getLogger("alps"), _ConsoleHandler(errors)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        progress = (
            ConsoleProgress(errors) if quiet else ConsoleProgress(errors, describe_load=cpu_contention().describe)
        )
        yield Console(quiet=quiet), progress
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
