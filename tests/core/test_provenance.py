"""Versions, machine and commit of a figure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alps.core import provenance as module
from alps.core.provenance import commit, provenance, source_tree


@pytest.fixture
def uncached_commit() -> Iterator[None]:
    """Forget the commit before and after a test."""
    commit.cache_clear()
    yield
    commit.cache_clear()


def test_provenance_names_versions_and_machine() -> None:
    values = provenance()
    assert values["torch"] == torch.__version__.split("+")[0] or values["torch"] == torch.__version__
    assert values["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert {"alps", "transformers", "safetensors", "machine", "commit"} <= set(values)
    assert all(isinstance(value, str) and value for value in values.values())


@pytest.mark.parametrize(("usable", "cores"), [(2, "2 of 64 cores"), (64, "64 cores")])
def test_the_machine_has_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, usable: int, cores: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(module, "usable_cpus", lambda: usable)
    assert provenance()["machine"].split(", ")[-2:] == [cores, f"{torch.get_num_threads()} threads"]


@pytest.mark.usefixtures("uncached_commit")
def test_git_is_called_once_per_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command[3])
        return subprocess.CompletedProcess(command, 0, "abc1234\n" if command[3] == "rev-parse" else " M file\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(module, "source_tree", lambda _: tmp_path)
    assert [provenance()["commit"] for _ in range(3)] == ["abc1234+"] * 3
    assert calls == ["rev-parse", "status"]


@pytest.mark.usefixtures("uncached_commit")
def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("git was called")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "alps" / "core" / "provenance.py"))
    assert commit() == "unknown"


def test_only_the_work_tree_of_this_project_counts(tmp_path: Path) -> None:
    package = tmp_path / "src" / "alps"
    package.mkdir(parents=True)
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "alps-prune"\n')
    assert source_tree(package) is None
    (tmp_path / ".git").mkdir()
    assert source_tree(package) == tmp_path
    assert source_tree(tmp_path / "lib" / "alps") is None
    project.write_text('[project]\nname = "other"\n')
    assert source_tree(package) is None
    project.unlink()
    assert source_tree(package) is None


def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    # The repository is that of the folder above: its commits are not those of this project.
    (tmp_path / ".git").mkdir()
    package = tmp_path / "vendored" / "src" / "alps"
    package.mkdir(parents=True)
    (tmp_path / "vendored" / "pyproject.toml").write_text('[project]\nname = "alps-prune"\n')
    assert source_tree(package) is None
