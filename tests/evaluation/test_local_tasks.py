"""Files of local items for the zero-shot tasks, and names of tasks; all without lm-eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import load
from alps.evaluation.local_tasks import read_documents
from alps.evaluation.tasks import find_tasks

PIQA = {"goal": "Boil an egg.", "sol1": "in water", "sol2": "in sand", "label": 1}


def _write(folder: Path, task: str, *lines: object) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Task 'piq' has no definition .*Did you mean 'piqa'\?"):
        read_documents("piq", tmp_path)
    with pytest.raises(ConfigError, match=r"needs its items in '.*/piqa.jsonl', which does not exist"):
        read_documents("piqa", tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        read_documents("piqa", tmp_path / "nowhere")
    _write(tmp_path, "piqa", "", "")
    with pytest.raises(ConfigError, match="is empty"):
        read_documents("piqa", tmp_path)
    _write(tmp_path, "piqa", PIQA, "{broken")
    with pytest.raises(ConfigError, match=r"Line 2 of .* is not JSON"):
        read_documents("piqa", tmp_path)


@pytest.mark.parametrize("names", [[], [""], [" ", ""]], ids=str)
def test_no_names(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No task is named"):
        find_tasks(names, tmp_path)


def test_a_limit_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A limit of 0 items"):
        find_tasks(["piqa"], tmp_path, 0)


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_without_the_packages_the_command_to_install_them_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stories: Path
) -> None:
    _write(tmp_path, "piqa", PIQA)
    monkeypatch.setitem(sys.modules, "lm_eval", None if package == "lm_eval" else sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as found:
        alps.evaluate_tasks(load(str(stories)), ["piqa"], task_data=tmp_path)
    assert f"need the package {package.replace('_', '-')} (" in str(found.value)
    assert str(found.value).endswith('pip install "lm-eval>=0.4.12" accelerate')


def test_an_lm_eval_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _write(tmp_path, "piqa", PIQA)
    monkeypatch.setitem(sys.modules, "lm_eval", sys)
    monkeypatch.setattr("alps.evaluation.tasks.version", {"lm-eval": "0.4.9"}.__getitem__)
    with pytest.raises(ConfigError, match=r"lm-eval 0\.4\.12 or newer, and 0\.4\.9 is installed"):
        find_tasks(["piqa"], tmp_path)
