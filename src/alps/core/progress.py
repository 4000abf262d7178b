"""How a run tells where it is: a live bar on a terminal, plain lines elsewhere, nothing for callers of the API."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """What the walk and the evaluation report to."""

    def start(self, title: str, total: int) -> None:
        """A job of `total` steps begins."""

    def step(self, detail: str) -> None:
        """One step is done; `detail` says what it was."""

    def finish(self) -> None:
        """The job is over, however it ended."""


class NoProgress:
    """Reports to nobody."""

    def start(self, title: str, total: int) -> None:
        pass

    def step(self, detail: str) -> None:
        pass

    def finish(self) -> None:
        pass


class ConsoleProgress:
    """A bar with the remaining time on a terminal, at most a line every few seconds elsewhere."""

    def __init__(self, console: Console, every_seconds: float = 5.0) -> None:
        self._console, self._every = console, every_seconds
        self._bar: RichProgress | None = None
        self._title, self._total, self._done = "", 0, 0
        self._started = self._printed = 0.0

    def start(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(title, total=total, detail="")

    def step(self, detail: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, detail=detail)
            return
        now = time.monotonic()
        if now - self._printed >= self._every or self._done == self._total:
            self._printed = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._console.print(
                f"{self._title}: {self._done}/{self._total}  {detail}  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
