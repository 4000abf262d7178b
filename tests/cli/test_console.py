"""Output of commands: results on stdout, messages of the logger on stderr, and a logger as it was."""

from __future__ import annotations

import logging

import pytest

from alps.cli.console import console_output

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
