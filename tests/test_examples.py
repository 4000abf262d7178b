"""The scripts in examples run on a small model, and do what they say."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alps.core.statistics import InputStats
from alps.solvers.patterns import SemiStructured, Unstructured
from helpers import cli_process

EXAMPLES = Path(__file__).parent.parent / "examples"
_SIZES = ("--samples", 8, "--seqlen", 64)


def run(name: str, *arguments: object, **settings: Any) -> str:
    done = cli_process.run_script(EXAMPLES / f"{name}.py", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_shows_its_own_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    assert f"    python examples/{path.name} " in (ast.get_docstring(ast.parse("\n".join(lines)), clean=False) or "")


def test_relative_importance_is_that_of_the_paper() -> None:
    ria = runpy.run_path(str(EXAMPLES / "own_method.py"))["Ria"]()
    weight = torch.tensor([[1.0, -2.0, 0.0, 3.0], [4.0, 0.0, 0.0, -1.0]])
    stats = InputStats.of(torch.tensor([[[4.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 9.0]]]))
    score = torch.zeros(2, 4)
    for i in range(2):
        for j in range(4):
            if weight[i, j]:
                share = 1 / weight[i].abs().sum() + 1 / weight[:, j].abs().sum()
                score[i, j] = weight[i, j].abs() * share * stats.norms()[j] ** 0.5
    for pattern in (Unstructured(0.75), Unstructured(0.5), SemiStructured(1, 4)):
        solution = ria.solve(weight, ria.prepare(stats), pattern)
        assert torch.equal(solution.mask, pattern.select(score))
        assert torch.equal(solution.weight, weight * solution.mask)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_help_text_is_that_of_the_script(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0] in run(path.stem, "--help")


@pytest.mark.slow
def test_a_model_is_pruned_measured_and_trained(short_stories: Path, english_file: Path, tmp_path: Path) -> None:
    printed = run("prune_and_evaluate", short_stories, tmp_path / "pruned", "--windows", 4, *_SIZES)
    assert re.search(r"50\.00%\) in 14 layers", printed)
    assert re.search(r"^perplexity \d+\.\d\d, dense \d+\.\d\d, KL 0\.\d{4} nats$", printed, re.MULTILINE)
    assert len(re.findall(r"^model\.layers\.[01]\.\S+: error ", printed, re.MULTILINE)) == 3

    printed = run("train_with_zeros", tmp_path / "pruned", english_file, tmp_path / "tuned", "--seqlen", 64)
    before, after = map(float, re.findall(r"^perplexity (\S+) ", printed, re.MULTILINE))
    assert after < before and "50.00% zeros" in printed
    pruned, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "tuned"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(pruned[name] == 0, tuned[name] == 0) and not torch.equal(pruned[name], tuned[name])


@pytest.mark.slow
def test_an_own_method_is_compared_with_others(short_stories: Path) -> None:
    printed = run("own_method", short_stories, *_SIZES)
    errors = {name: float(error) for name, error in re.findall(r"^(\w+): mean relative error (\S+),", printed, re.M)}
    assert list(errors) == ["ria", "wanda", "magnitude"]
    assert errors["ria"] < errors["magnitude"]
