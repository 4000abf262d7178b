"""Directories that appear whole or not at all, whatever happens while they are filled."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alps.checkpoints.atomic_io import (
    check_space,
    check_target,
    fresh_directory,
    new_directory,
    remove_partial,
    temporary_directory,
)
from alps.core.errors import CheckpointError
from alps.data.loaded_model import LoadedModel
from alps.pruning.write import write
from alps.reporting.run_report import RunReport


def _fill(out: Path, content: str = "weights", replaceable: str | None = None) -> None:
    with new_directory(out, replaceable) as folder:
        (folder / "model.bin").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_directory_appears_whole_and_only_at_the_end(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with new_directory(out) as folder:
        (folder / "model.bin").write_text("weights")
        assert not (out / "model.bin").exists() and out.exists() == existing
        assert folder.parent == tmp_path  # a neighbour: the rename stays on one file system
    assert _tree(tmp_path) == ["out", "out/model.bin"]
    assert (out / "model.bin").read_text() == "weights"


def test_parents_are_created_and_relative_names_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _fill(Path("a/b/out"))
    assert (tmp_path / "a/b/out/deep/file").read_text() == "x"
    assert _tree(tmp_path / "a/b") == ["out", "out/deep", "out/deep/file", "out/model.bin"]


def test_the_directory_is_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _fill(tmp_path / "out")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with pytest.raises(error), new_directory(out) as folder:
        (folder / "model.bin").write_text("half")
        raise error
    assert _tree(tmp_path) == (["out"] if existing else [])


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"'.*out' cannot be written: No space left on device"),
        new_directory(tmp_path / "out") as folder,
    ):
        (folder / "model.bin").write_text("half")
        raise OSError(28, "No space left on device")
    assert _tree(tmp_path) == []


_KILLED = """
import sys, time
from pathlib import Path
from alps.checkpoints.atomic_io import new_directory
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "model.bin").write_text("half")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_directory_of_that_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert (partial / "model.bin").read_text() == "half"  # it was in the middle of its work
    assert not out.exists() and partial.name.startswith(".out.partial-")
    _fill(out)  # and the next run is not hindered
    assert (out / "model.bin").read_text() == "weights"


def test_a_directory_that_is_not_empty_is_refused_and_untouched(tmp_path: Path) -> None:
    _fill(tmp_path / "out", "old")
    before = _tree(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty"):
        check_target(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not empty"):
        _fill(tmp_path / "out", "new", "other.json")
    assert _tree(tmp_path) == before and (tmp_path / "out/model.bin").read_text() == "old"


def test_a_replaceable_directory_is_replaced_whole(tmp_path: Path) -> None:
    _fill(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("gone afterwards")
    check_target(tmp_path / "out", "model.bin")
    _fill(tmp_path / "out", "new", "model.bin")
    assert _tree(tmp_path) == ["out", "out/deep", "out/deep/file", "out/model.bin"]
    assert (tmp_path / "out/model.bin").read_text() == "new"


def test_a_replaceable_directory_outlives_a_failure(tmp_path: Path) -> None:
    _fill(tmp_path / "out", "old")
    before = _tree(tmp_path)
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out", "model.bin") as folder:
        (folder / "model.bin").write_text("half")
        raise RuntimeError
    assert _tree(tmp_path) == before and (tmp_path / "out/model.bin").read_text() == "old"


def test_a_replaceable_directory_outlives_a_failing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "out", "old")
    real = Path.rename

    def fails_into_place(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _fill(tmp_path / "out", "new", "model.bin")
    assert (tmp_path / "out/model.bin").read_text() == "old"


def test_places_that_cannot_hold_a_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(tmp_path / "file")
    for out in (tmp_path / "file" / "out", Path("/proc/alps/out")):
        with pytest.raises(CheckpointError, match=r"cannot be created \(.+\): choose a place"):
            check_target(out)
    assert _tree(tmp_path) == ["file"]


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / "b" / "out")
    assert _tree(tmp_path) == []


@pytest.mark.parametrize("case", ["link to an empty directory", "dangling link", "long name", "longer name"])
def test_what_the_check_lets_pass_can_be_written(tmp_path: Path, case: str) -> None:
    # Refusing is as good, as long as it is done before the work.
    out = tmp_path / "out"
    if case == "long name":
        out = tmp_path / ("n" * 250)
    elif case == "longer name":
        out = tmp_path / ("n" * 256)
    else:
        out.symlink_to(tmp_path / "target")
        if case == "link to an empty directory":
            (tmp_path / "target").mkdir()
    try:
        check_target(out)
    except CheckpointError:
        return
    _fill(out)
    assert (out / "model.bin").read_text() == "weights"


def test_what_is_written_with_a_marker_can_be_replaced_by_the_same_call(
    tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    loaded = LoadedModel("tiny", tiny_model("llama"), None)
    report = RunReport(
        model="tiny", architecture="Any", method="alps", pattern="70%", dtype="float32", device="cpu", calibration=None
    )
    for _ in range(2):
        write(loaded, report, tmp_path / "out", replaceable=".marker")
    assert (tmp_path / "out" / ".marker").is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with pytest.raises(CheckpointError, match="not empty"):
        write(loaded, report, tmp_path / "out")


def test_what_a_kill_left_of_an_output_is_removed(tmp_path: Path) -> None:
    for name in (".out.partial-abc", ".out.partial-old-abc", ".out2.partial-abc", ".other.partial-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_partial(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-abc", ".out2.partial-abc"]


def test_a_temporary_directory_leaves_nothing(tmp_path: Path) -> None:
    with temporary_directory(tmp_path / "a" / "b" / "out") as folder:
        assert folder.parent == tmp_path / "a" / "b"
        (folder / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"), temporary_directory(tmp_path / "file" / "out"):
        pass


def test_a_fresh_directory_is_empty_and_goes(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "stale").write_text("x")
    with fresh_directory(tmp_path / "files") as folder:
        assert list(folder.iterdir()) == []
        (folder / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="cannot be written"), fresh_directory(tmp_path / "a" / "files"):
        pass


def test_space_is_compared_with_the_disk_of_the_next_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    free = SimpleNamespace(total=10, free=5)

    def usage(folder: Path) -> SimpleNamespace:
        folders.append(folder)
        return free

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "a" / "out", 5)
    with pytest.raises(CheckpointError, match=r"needs 3\.0 GiB, and its disk has 0 MiB left"):
        check_space(tmp_path / "a" / "out", 3 * 2**30)
    assert set(folders) == {tmp_path}
    free.total = free.free = 0
    check_space(tmp_path, 5)
