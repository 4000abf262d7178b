"""Every fault of the table: one sentence, exit code 2, no traceback, nothing written; the page has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import cli_process as started
from helpers.fault_fixture import PICKLES, Scene, arguments, run_in_scene
from helpers.fault_table import FAULTS, Fault, run_fault

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "reliability.md"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}, {fault.command}")
def test_a_fault_is_one_sentence_and_nothing_is_written(fault: Fault, tmp_path: Path, stories: Path) -> None:
    found = run_fault(fault, tmp_path, stories)
    assert found.code == 2, found
    assert found.stdout == "" and "Traceback" not in found.stderr
    assert found.sentence.startswith("Error: ") and found.sentence.endswith(".") and fault.words in found.sentence
    assert len([line for line in found.stderr.splitlines() if line.startswith("Error: ")]) == 1
    if fault.early:
        assert found.stderr == found.sentence + "\n"
    assert not found.changed, "nothing may be written, left or run"
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["weights cut short in their data", "NaN in the embedding", "zero samples"])
def test_a_new_process_says_the_same(name: str, tmp_path: Path, stories: Path) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    scene = Scene(tmp_path, stories)
    words = arguments(scene, fault.command, *(fault.create(scene) or []))
    before = scene.contents()
    done = started.run(*words)
    assert done.returncode == 2 and done.stdout == "" and fault.words in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert scene.contents() == before


_COMMANDS = ("prune", "prune --dry-run", "eval", "inspect", "pack", "generate", "distill", "reconstruct", "compare")


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_refuses_another_kind_of_model_first(command: str, tmp_path: Path, stories: Path) -> None:
    scene = Scene(tmp_path, stories)
    scene.settings("config.json", model_type="marian", architectures=["MarianMTModel"])
    # Neither weights nor text are missed.
    scene.weights.unlink()
    scene.text.unlink()
    outcome = run_in_scene(scene, arguments(scene, *command.split()))
    assert (outcome.code, outcome.stdout, outcome.changed) == (2, "", False)
    assert outcome.stderr == (
        f"Error: Model '{scene.model}' (MarianMTModel) is an encoder-decoder: alps takes only decoder-only causal "
        "language models, of text or of text and images.\n"
    )


def test_without_a_fault_the_run_comes_through(tmp_path: Path, stories: Path) -> None:
    scene = Scene(tmp_path, stories)
    assert run_in_scene(scene, arguments(scene, "prune")).code == 0
    assert scene.out.is_dir()


def test_code_beside_a_known_architecture_is_left_alone(tmp_path: Path, stories: Path) -> None:
    """Many checkpoints still bring the code from before transformers had their architecture."""
    scene = Scene(tmp_path, stories)
    for name in ("own.py", "tokenizer_own.py"):
        (scene.model / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    scene.settings("config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    scene.settings("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizer_own.Own"]})
    assert run_in_scene(scene, arguments(scene, "prune")).code == 0
    assert run_in_scene(scene, arguments(scene, "inspect")).code == 0
    assert not (tmp_path / "run").exists()


def test_pickles_of_tensors_alone_are_read(tmp_path: Path, stories: Path) -> None:
    scene = Scene(tmp_path, stories)
    plain = run_in_scene(scene, arguments(scene, "prune"))
    (tmp_path / "out").rename(tmp_path / "plain")
    torch.save(load_file(scene.weights), scene.model / PICKLES)
    scene.weights.unlink()
    pickled = run_in_scene(scene, arguments(scene, "prune"))
    assert plain.code == pickled.code == 0, pickled.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_name_with_a_line_break_does_not_break_the_sentence(tmp_path: Path, stories: Path) -> None:
    scene = Scene(tmp_path, stories)
    found = run_in_scene(scene, arguments(scene, "prune", "--calibration", "a\nb\x1b[31m"))
    assert found.code == 2 and "'a\\nb\\x1b[31m'" in found.stderr and found.stderr.count("\n") == 1


def test_the_page_tells_of_every_fault() -> None:
    lines = PAGE.read_text().split("## Bad inputs")[1].split("```")[0].splitlines()
    rows = [line.replace("\\|", "/").strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [fault.name for fault in FAULTS]
    for row, fault in zip(rows, FAULTS, strict=True):
        assert fault.words in row[1] and row[2] == "nothing"
