"""Progress of a run: a live bar on a terminal, plain lines elsewhere, nothing for callers of the API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """Receiver of the progress of a job with a known number of steps."""

    def start(self, title: str, total: int) -> None:
        """Begin a job of `total` steps."""

    def step(self, detail: str) -> None:
        """Count one finished step; `detail` describes it."""

    def finish(self) -> None:
        """End the job, whether it succeeded or not."""


class NoProgress:
    """Progress that is shown nowhere."""

    def start(self, title: str, total: int) -> None:
        """Do nothing."""

    def step(self, detail: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class ConsoleProgress:
    """Progress as a bar with the remaining time on a terminal, elsewhere as a line every few seconds.

    Args:
        console: to print on.
        every_seconds: least time between two lines, and between two calls of `describe_load`.
        describe_load: returns what slows the job down since its last call, or nothing; shown after the detail.
    """

    def __init__(
        self, console: Console, every_seconds: float = 5.0, describe_load: Callable[[], str] = lambda: ""
    ) -> None:
        self._console, self._every_seconds, self._describe_load = console, every_seconds, describe_load
        self._bar: RichProgress | None = None
        self._title, self._total, self._done, self._load = "", 0, 0, ""
        self._started = self._printed = 0.0

    def start(self, title: str, total: int) -> None:
        """Show the bar, or start the clock."""
        self._title, self._total, self._done, self._load = title, total, 0, ""
        self._started = self._printed = time.monotonic()
        # From here on; what was before belongs to another job.
        self._describe_load()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(title, total=total, detail="")

    def step(self, detail: str) -> None:
        """Advance the bar, or print a line when it is time."""
        self._done += 1
        now = time.monotonic()
        is_due = now - self._printed >= self._every_seconds
        if is_due or (self._bar is None and self._done == self._total):
            self._printed = now
            self._load = self._describe_load()
        elif self._bar is None:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, detail="  ".join(filter(None, (detail, self._load))))
        else:
            left = (now - self._started) / self._done * (self._total - self._done)
            self._console.print(
                f"{self._title}: {self._done}/{self._total}  {detail}  {left:.0f} s left"
                + (f"  ({self._load})" if self._load else ""),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
