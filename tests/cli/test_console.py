"""Output of commands: results on stdout, messages of the logger on stderr, and a logger as it was."""

from __future__ import annotations

import logging

import pytest
import torch

from alps.cli.console import console_output, cpu_contention
from alps.core.cpu_load import CpuReading, CpuTime

_LOG = logging.getLogger("alps")


@pytest.mark.parametrize("quiet", [False, True])
def test_results_and_messages_are_apart(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before = (_LOG.level, list(_LOG.handlers))
    with pytest.raises(RuntimeError), console_output(quiet) as (console, progress):
        console.print("result")
        _LOG.info("A message about [model.layers.0] that is longer than any line of a terminal. " * 3)
        _LOG.debug("not this one")
        progress.start("pruning", 1)
        progress.step("block 0")
        progress.finish()
        raise RuntimeError
    printed = capsys.readouterr()
    assert (_LOG.level, list(_LOG.handlers)) == before
    if quiet:
        assert (printed.out, printed.err) == ("", "")
    else:
        assert printed.out == "result\n"
        message, progress_line = printed.err.splitlines()
        assert message.count("[model.layers.0]") == 3 and progress_line.startswith("pruning: 1/1  block 0")


@pytest.mark.parametrize(("ranks", "threads", "busy"), [(1, 3, False), (1, 7, True), (2, 3, True), (2, 2, False)])
def test_progress_counts_the_threads_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int, threads: int, busy: bool
) -> None:
    """Others use 4 of 8 CPUs: these are too few for more than 5 threads."""
    wall = [0.0]

    def read() -> CpuReading:
        wall[0] += 5.0
        return CpuReading(wall[0], 2 * wall[0], CpuTime(8, 6 * wall[0]))

    monkeypatch.setattr("alps.core.cpu_load.read_cpu_times", read)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    sentence = "other programs use 4.0 of 8 CPUs"
    assert cpu_contention().describe() == (sentence if busy else "")
    with console_output() as (_, progress):
        progress.start("pruning", 1)
        progress.step("block 0")
    with console_output(quiet=True) as (_, progress):
        progress.start("pruning", 1)
        progress.step("block 0")
    assert capsys.readouterr().err == "pruning: 1/1  block 0  0 s left" + f"  ({sentence})" * busy + "\n"
