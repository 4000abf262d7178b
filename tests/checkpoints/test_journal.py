"""The journal of finished blocks: what it keeps, when it stays, and whom it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alps.checkpoints.journal import check_journal, journal_directory, open_journal
from alps.core.errors import CheckpointError
from helpers.cli_process import run_code

_FINGERPRINT = {"sparsity": "0.7", "the model's weights": "a" * 64}


def _keep_two(out: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), open_journal(out, _FINGERPRINT) as journal:
        journal.note("patterns", {"a": "0.5"})
        for index in range(2):
            journal.save_tensors(index, {"w": torch.full((2, 3), index, dtype=torch.bfloat16)})
            journal.save_record(index, {"number": index})
        raise RuntimeError("stop")


def test_finished_blocks_outlive_a_failure(tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    with open_journal(tmp_path / "out", _FINGERPRINT) as journal:
        assert journal.finished == 2 and journal.notes == {"patterns": {"a": "0.5"}}
        assert journal.record(1) == {"number": 1}
        assert torch.equal(journal.tensors(1)["w"].read(), torch.ones(2, 3, dtype=torch.bfloat16))
        journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_without_a_finished_block_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_journal(tmp_path / "out", _FINGERPRINT):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_block_without_its_record_is_not_finished(tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    (journal_directory(tmp_path / "out") / "block-00001.json").unlink()
    with open_journal(tmp_path / "out", _FINGERPRINT) as journal:
        assert journal.finished == 1
        journal.save_tensors(1, {"w": torch.zeros(1)})
        assert torch.equal(journal.tensors(1)["w"].read(), torch.zeros(1))


def test_another_run_is_refused_in_words(tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    other = {**_FINGERPRINT, "sparsity": "0.5", "the model's weights": "b" * 64}
    with pytest.raises(CheckpointError) as result:
        check_journal(tmp_path / "out", {"sparsity": "0.5"}, resume=False)
    assert "sparsity was 0.7 and is 0.5" in str(result.value) and "weights" not in str(result.value)
    words = r"the model's weights was a{12}\.\.\. and is b{12}\.\.\."
    with pytest.raises(CheckpointError, match=words), open_journal(tmp_path / "out", other):
        pass
    check_journal(tmp_path / "out", _FINGERPRINT, resume=True)


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is nothing to resume"):
        check_journal(tmp_path / "out", _FINGERPRINT, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", '{"format": 99}', '{"format": 1, "fingerprint": 3, "notes": {}}', "[]"])
def test_a_damaged_journal_is_refused(text: str, tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    (journal_directory(tmp_path / "out") / "journal.json").write_text(text)
    with (
        pytest.raises(CheckpointError, match="not a journal of this version"),
        open_journal(tmp_path / "out", _FINGERPRINT),
    ):
        pass


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom alps.checkpoints.journal import open_journal\n"
        "from alps.core.errors import CheckpointError\n"
        "try:\n    with open_journal(Path(sys.argv[1]), {}): pass\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    with open_journal(tmp_path / "out", {}) as journal:
        journal.save_tensors(0, {})
        journal.save_record(0, {})
        done = run_code(script, tmp_path / "out")
        assert "Another process is at work" in done.stdout, done.stderr
        assert journal.record(0) == {}


def test_a_journal_is_readable_json(tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    content = json.loads((journal_directory(tmp_path / "out") / "journal.json").read_text())
    assert content == {"format": 1, "fingerprint": _FINGERPRINT, "notes": {"patterns": {"a": "0.5"}}}
