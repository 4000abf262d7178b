"""A sparse model is pruned further: its zeros stay, by every method, and the counts are those of the pattern."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import alps
from alps.cli.main import app
from alps.data.loaded_model import load
from alps.models.blocks import find_blocks
from alps.reporting.run_report import RunReport
from alps.solvers import METHODS, get_method
from alps.solvers.patterns import parse_pattern


def _sites(model: nn.Module) -> dict[str, Tensor]:
    return {site.name: site.read() for block in find_blocks(model) for site in block.sites}


@pytest.fixture(scope="module")
def text(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english)
    return path


@pytest.fixture(scope="module")
def half(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model, pruned to 50 % by Wanda."""
    out: Path = tmp_path_factory.mktemp("half") / "out"
    alps.prune(stories, sparsity=0.5, method="wanda", calibration=text, samples=4, seqlen=64, out=out)
    return out


@pytest.mark.parametrize("name", [*METHODS, "wanda+refit"])
@pytest.mark.parametrize("pattern", [0.7, "1:4"])
def test_every_method_prunes_a_sparse_model_further(half: Path, text: Path, name: str, pattern: str | float) -> None:
    loaded = load(str(half))
    before = {site: weight == 0 for site, weight in _sites(copy.deepcopy(loaded.model)).items()}
    base, _, extra = name.partition("+")
    method = get_method(base, refit=extra == "refit")
    settings: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 64, "tokenizer": loaded.tokenizer}
    report = alps.prune(loaded.model, pattern=parse_pattern(str(pattern)), method=method, keep_zeros=True, **settings)
    records = {record.name: record for record in report.layers}
    for site, weight in _sites(loaded.model).items():
        zeros = weight == 0
        assert not bool((before[site] & ~zeros).any()), f"{site}: a zero came back"
        if pattern == 0.7:
            assert int(zeros.sum()) == round(0.7 * weight.numel()) == records[site].zeros
        else:
            kept = [(~one).reshape(-1, 4).sum(dim=1) for one in (zeros, before[site])]
            assert torch.equal(kept[0], kept[1].clamp_max(1))
        assert records[site].zeros_before == int(before[site].sum()) == round(0.5 * weight.numel())
    found = sum(int(zeros.sum()) for zeros in before.values())
    assert report.notes == [f"{found:,} weights of the pruned layers were zero before, stay zero and are counted."]


def test_without_it_zeros_may_come_back(half: Path, text: Path) -> None:
    loaded = load(str(half))
    before = {site: weight == 0 for site, weight in _sites(copy.deepcopy(loaded.model)).items()}
    settings: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 64, "tokenizer": loaded.tokenizer}
    report = alps.prune(loaded.model, sparsity=0.7, method="alps", **settings)
    assert any(bool((before[site] & (weight != 0)).any()) for site, weight in _sites(loaded.model).items())
    assert all(record.zeros_before is None for record in report.layers) and report.notes == []


@pytest.mark.parametrize(
    "settings",
    [{"true_sequential": True, "dense_target": 0.4, "reconstruct_epochs": 1}, {"dense_target": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("budget", ["uniform", "owl", "error", "sensitivity"])
def test_zeros_stay_with_targets_matching_and_budgets(
    half: Path, text: Path, settings: dict[str, Any], budget: Any
) -> None:
    """One site has more zeros than any budget would give it: they stay, and the others get fewer."""
    loaded = load(str(half))
    first = _sites(loaded.model)["model.layers.2.mlp.up_proj"]
    first[:, : first.shape[1] * 95 // 100] = 0
    before = {site: weight == 0 for site, weight in _sites(copy.deepcopy(loaded.model)).items()}
    shared: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 64, "tokenizer": loaded.tokenizer}
    report = alps.prune(
        loaded.model, sparsity=0.7, method="alps", keep_zeros=True, allocation=budget, **shared, **settings
    )
    for site, weight in _sites(loaded.model).items():
        assert not bool((before[site] & (weight != 0)).any()), site
    zeros = {record.name: record.zeros for record in report.layers}
    (full,) = (record for record in report.layers if record.name == "model.layers.2.mlp.up_proj")
    assert full.zeros == full.zeros_before == int(before[full.name].sum()) > 0.9 * full.entries
    wanted = sum(round(0.7 * record.entries) for record in report.layers)
    if budget == "uniform":
        assert all(zeros[r.name] == round(0.7 * r.entries) for r in report.layers if r is not full)
    else:
        assert report.zeros == wanted


def test_a_model_with_zeros_enough_is_left_as_it_is(half: Path, text: Path) -> None:
    loaded = load(str(half))
    dense = copy.deepcopy(loaded.model)
    shared: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 64, "tokenizer": loaded.tokenizer}
    report = alps.prune(loaded.model, sparsity=0.4, method="alps", keep_zeros=True, **shared)
    assert {record.solve["status"] for record in report.layers} == {"unchanged"} and report.sparsity == 0.5
    for name, parameter in dense.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


def test_a_dense_model_is_pruned_as_without_it(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    models = [tiny_model("llama"), tiny_model("llama")]
    alps.prune(models[0], sparsity=0.6, method="wanda", calibration=ids)
    report = alps.prune(models[1], sparsity=0.6, method="wanda", calibration=ids, keep_zeros=True)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert {record.zeros_before for record in report.layers} == {0}


def test_the_command_line_respects_zeros_and_rules(half: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--samples", "4", "--seqlen", "64", "--calibration", str(text)]
    flags = ["--sparsity", "0.7", "--method", "sparsegpt", "--keep-zeros", "--keep-dense", "*.o_proj,lm_head"]
    result = CliRunner().invoke(app, ["prune", str(half), str(out), *flags, *sizes])
    assert result.exit_code == 0, result.output
    assert "were zero before, stay zero and are counted" in result.stdout
    assert "5 more with 20,480 weights are kept dense by rules (*.o_proj)" in result.stdout
    before, after = (_sites(load(str(folder)).model) for folder in (half, out))
    for site, weight in after.items():
        assert not bool(((before[site] == 0) & (weight != 0)).any())
        if site.endswith("o_proj"):
            assert torch.equal(weight, before[site])
        else:
            assert int((weight == 0).sum()) == round(0.7 * weight.numel())
    report = RunReport.read(out)
    assert report is not None and "| zeros before pruning, all kept | " in (out / "README.md").read_text()
