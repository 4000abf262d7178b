"""The journal of finished blocks: what it keeps, when it stays, and whom it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alps.checkpoints.atomic_io import remove_partial
from alps.checkpoints.journal import check_journal, journal_directory, open_journal
from alps.checkpoints.safetensors_io import DTYPES, TensorToWrite, list_tensors, write_tensors
from alps.checkpoints.weight_files import read_weight_file
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


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=0, max_size=5
    )
)
def test_files_hold_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("shards") / "one.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"t{n}": torch.randint(0, 2, shape, generator=generator).to(DTYPES[word])
        for n, (word, shape) in enumerate(wanted)
    }
    write_tensors(path, [TensorToWrite(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()])  # type: ignore[misc]
    from safetensors.torch import load_file

    result = load_file(path)
    ours = {item.name: item for item in list_tensors(read_weight_file(path))}
    assert result.keys() == tensors.keys() == ours.keys()
    for name, tensor in tensors.items():
        assert result[name].dtype == tensor.dtype and torch.equal(result[name], tensor)
        assert torch.equal(ours[name].read(), tensor)
        mapped = ours[name].memory_map()
        assert mapped.dtype == tensor.dtype and torch.equal(mapped, tensor)
        if tensor.ndim == 2 and len(tensor) > 1:
            assert torch.equal(
                ours[name].contiguous_slice(tensor.shape[1], (len(tensor) - 1, tensor.shape[1])).read(), tensor[1:]
            )


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_tensors(path, [TensorToWrite("w", torch.float32, (100,), lambda: torch.ones(100))])
    (stored,) = list_tensors(read_weight_file(path))
    path.write_bytes(path.read_bytes()[:-8])
    for read in (stored.read, stored.memory_map):
        with pytest.raises(CheckpointError, match="ends inside w"):
            read()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_mapped_tensor_takes_no_memory_until_it_is_touched_and_writes_nothing(tmp_path: Path) -> None:
    path, size = tmp_path / "one.safetensors", 2**24
    write_tensors(path, [TensorToWrite("w", torch.float32, (size,), lambda: torch.ones(size))])
    content = hashlib.sha256(path.read_bytes()).digest()
    before = _private_bytes()
    (stored,) = list_tensors(read_weight_file(path))
    mapped = stored.memory_map()
    assert float(mapped.sum()) == size and _private_bytes() - before < stored.nbytes / 4
    mapped[: size // 2] = 2.0
    assert _private_bytes() - before > stored.nbytes / 4
    assert float(stored.memory_map().sum()) == size and hashlib.sha256(path.read_bytes()).digest() == content


def _private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def stop() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
        write_tensors(tmp_path / "one.safetensors", [TensorToWrite("w", torch.float32, (1,), stop)])
    assert list(tmp_path.iterdir()) == []


def test_a_journal_is_readable_json(tmp_path: Path) -> None:
    _keep_two(tmp_path / "out")
    content = json.loads((journal_directory(tmp_path / "out") / "journal.json").read_text())
    assert content == {"format": 1, "fingerprint": _FINGERPRINT, "notes": {"patterns": {"a": "0.5"}}}


def test_what_a_kill_left_of_an_output_is_removed(tmp_path: Path) -> None:
    for name in (".out.partial-abc", ".out.partial-old-abc", ".out2.partial-abc", ".other.partial-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_partial(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-abc", ".out2.partial-abc"]
