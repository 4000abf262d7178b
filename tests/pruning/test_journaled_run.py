"""Journal of a run as a context: who opens it, and what errors say about the work that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alps.checkpoints.journal import Journal, journal_directory, open_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.pruning.journaled_run import errors_with_progress, finished_work, shared_journal
from helpers.thread_group import run_in_threads

_FINGERPRINT = {"job": "test"}


def _finish(journal: Journal, index: int) -> None:
    journal.save_tensors(index, {"w": torch.ones(1)})
    journal.save_record(index, {})


def test_errors_say_how_many_blocks_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(SolveFailed) as failed,
        shared_journal(out, _FINGERPRINT, SINGLE_PROCESS) as journal,
        errors_with_progress(journal, "the first step"),
    ):
        for index in range(2):
            _finish(journal, index)
        raise SolveFailed("Layer x: no.")
    folder = journal_directory(out)
    assert str(failed.value) == (
        f"Layer x: no. 2 finished blocks are kept in '{folder}': the same command resumes there."
    )
    with (
        pytest.raises(KeyboardInterrupt, match=r"Interrupted\. 3 finished blocks are kept"),
        shared_journal(out, _FINGERPRINT, SINGLE_PROCESS) as journal,
        errors_with_progress(journal, "the first step"),
    ):
        assert finished_work(journal, "the first step") == "2 finished blocks"
        _finish(journal, 2)
        raise KeyboardInterrupt


def test_the_first_step_is_named_and_nothing_is_promised_without_work(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt) as plain,
        shared_journal(tmp_path / "plain", _FINGERPRINT, SINGLE_PROCESS) as journal,
        errors_with_progress(journal, "the first step"),
    ):
        raise KeyboardInterrupt
    assert str(plain.value) == "" and list(tmp_path.iterdir()) == []
    with (
        pytest.raises(KeyboardInterrupt, match=r"Interrupted\. The first step is kept in '.*noted\.partial': the same"),
        shared_journal(tmp_path / "noted", _FINGERPRINT, SINGLE_PROCESS) as journal,
        errors_with_progress(journal, "the first step"),
    ):
        journal.note("step", 1)
        raise KeyboardInterrupt


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError, match=r"^mistake$"),
        shared_journal(tmp_path / "out", _FINGERPRINT, SINGLE_PROCESS) as journal,
        errors_with_progress(journal, "the first step"),
    ):
        _finish(journal, 0)
        raise ZeroDivisionError("mistake")


def test_the_main_rank_holds_the_journal_and_the_others_follow(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), open_journal(out, _FINGERPRINT) as journal:
        _finish(journal, 0)
        raise RuntimeError
    stale = tmp_path / ".out.partial-stale"
    stale.mkdir()

    def work(group: ProcessGroup) -> int:
        with shared_journal(out, _FINGERPRINT, group) as shared:
            group.barrier()
            if group.rank == 1:
                shared.save_tensors(1, {"w": torch.ones(1)})
            group.barrier()
            if group.is_main:
                shared.save_record(1, {})
            group.barrier()
            finished = shared.finished
            group.barrier()
            if group.is_main:
                shared.discard()
        return finished

    assert run_in_threads(2, work) == [2, 2]
    assert list(tmp_path.iterdir()) == []
