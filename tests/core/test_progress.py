"""Progress as lines: at most one in a while, the last one always, with the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from alps.core.progress import ConsoleProgress, NoProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the only number of this list."""
    now = [100.0]
    monkeypatch.setattr("alps.core.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_are_rare_and_the_last_step_has_one(clock: list[float]) -> None:
    output = io.StringIO()
    progress = ConsoleProgress(Console(file=output, width=20), every_seconds=5.0)
    progress.start("Pruning", 6)
    for step in range(6):
        clock[0] += 2.0
        progress.step(f"block {step} of a [name] that is longer than a line")
    progress.finish()
    lines = output.getvalue().splitlines()
    # After 6 s and after 12 s, with 2 s a step.
    assert [line.split("  ")[0] for line in lines] == ["Pruning: 3/6", "Pruning: 6/6"]
    assert lines[0] == "Pruning: 3/6  block 2 of a [name] that is longer than a line  6 s left"
    assert lines[1].endswith("  0 s left")


def test_lines_say_what_slows_the_job_down(clock: list[float]) -> None:
    output = io.StringIO()
    loads = iter(["before the job", "", "other programs use 1.8 of 2 CPUs"])
    progress = ConsoleProgress(Console(file=output), every_seconds=5.0, describe_load=lambda: next(loads))
    progress.start("Pruning", 4)
    for step in range(4):
        clock[0] += 3.0
        progress.step(f"block {step}")
    assert output.getvalue().splitlines() == [
        "Pruning: 2/4  block 1  6 s left",
        "Pruning: 4/4  block 3  0 s left  (other programs use 1.8 of 2 CPUs)",
    ]


def test_the_bar_says_what_slows_the_job_down(clock: list[float]) -> None:
    """The sentence stays until the next reading, and goes with it; another job begins without it."""
    loads = iter(["before the job", "busy CPUs", "", "busy CPUs", "before the next job"])
    progress = ConsoleProgress(
        Console(file=io.StringIO(), width=100, force_terminal=True),
        every_seconds=5.0,
        describe_load=lambda: next(loads),
    )
    progress.start("Pruning", 20)
    assert progress._bar is not None
    details = []
    for step in range(9):
        clock[0] += 2.0
        progress.step(f"block {step}")
        details.append(progress._bar.tasks[0].fields["detail"])
    progress.finish()
    busy = [detail.partition("  ")[2] for detail in details]
    # Read after 6, 12 and 18 seconds.
    assert busy == ["", "", "busy CPUs", "busy CPUs", "busy CPUs", "", "", "", "busy CPUs"]
    assert [detail.partition("  ")[0] for detail in details] == [f"block {step}" for step in range(9)]
    progress.start("Evaluating", 2)
    assert progress._bar is not None
    progress.step("")
    assert progress._bar.tasks[0].fields["detail"] == ""
    progress.finish()


def test_a_terminal_has_a_bar_that_goes_at_the_end() -> None:
    output = io.StringIO()
    progress = ConsoleProgress(Console(file=output, width=100, force_terminal=True))
    progress.start("Pruning", 2)
    progress.step("block 0 of [/m]")
    progress.step("block 1")
    progress.finish()
    progress.finish()
    assert "2/2" in output.getvalue() and "block 1" in output.getvalue()


def test_no_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = NoProgress()
    progress.start("Pruning", 1)
    progress.step("x")
    progress.finish()
    assert capsys.readouterr() == ("", "")
