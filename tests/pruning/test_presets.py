"""Presets and the settings they stand for: what wins over what, and the whole command with all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import alps
from alps.cli.main import app
from alps.core.errors import ConfigError
from alps.finetuning.block_reconstruction import ReconstructionParameters
from alps.finetuning.reconstruct_checkpoint import load_reconstruct_config
from alps.pruning.config import load_prune_config
from alps.pruning.presets import PRESETS
from alps.solvers.dense_target import parse_target


def test_a_preset_yields_to_the_file_and_the_file_to_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nsparsity: 0.7\npreset: best\nmatch: 3\nbudget: owl\n")
    settings = load_prune_config(path, {"budget": "error"})
    assert (settings.preset, settings.order, settings.match, settings.budget) == ("best", "sequential", 3, "error")
    assert settings.target_share() == PRESETS["best"]["target"]
    assert settings.matching() == ReconstructionParameters(epochs=3, target=PRESETS["best"]["match_target"])


def test_matching_aims_at_the_dense_stream_unless_told() -> None:
    unasked = load_prune_config(None, {"model": "m", "sparsity": 0.5, "match": 1}).matching()
    told = load_prune_config(None, {"model": "m", "sparsity": 0.5, "match": 1, "match_target": "0.4"}).matching()
    assert (unasked, told) == (
        ReconstructionParameters(target=parse_target("dense")),
        ReconstructionParameters(target=0.4),
    )
    assert load_reconstruct_config({}).matching().target == parse_target("dense")


def test_a_preset_aims_at_nothing_where_nothing_is_matched() -> None:
    asked = {"model": "m", "sparsity": 0.5, "preset": "best"}
    assert load_prune_config(None, asked).matching() == ReconstructionParameters(
        epochs=1, target=PRESETS["best"]["match_target"]
    )
    assert load_prune_config(None, {**asked, "match": 0}).matching() is None
    with pytest.raises(ConfigError, match=r"Match target '0\.3' aims at nothing"):
        load_prune_config(None, {**asked, "match": 0, "match_target": 0.3}).matching()


def test_the_paper_is_what_one_gets_unasked() -> None:
    plain, named = ({"model": "m", "sparsity": 0.5, **extra} for extra in ({}, {"preset": "paper"}))
    settings = load_prune_config(None, plain)
    assert settings == load_prune_config(None, named)
    assert (settings.order, settings.target_share(), settings.matching(), settings.budget) == (
        "block",
        0.0,
        None,
        "uniform",
    )


def test_presets_are_what_the_documentation_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    told = re.findall(r"^\| `(\w+)`[^|]*\| (\w+) \| ([\w.]+) \| ([^|]+) \| (\w+)[^|]*\| ([\w-]+)[^|]*\|$", text, re.M)
    assert [row[0] for row in told] == list(PRESETS)
    for name, order, target, matching, budget, channels in told:
        settings = load_prune_config(None, {"model": "m", "sparsity": 0.5, "preset": name})
        found = settings.matching()
        assert (settings.order, settings.budget, settings.channels) == (order, budget, channels)
        assert settings.target_share() == parse_target(target)
        assert matching == ("none" if found is None else f"{found.epochs} epoch, aimed at {found.target}")


@pytest.mark.parametrize(
    ("asked", "budget", "channels"),
    [
        ({"sparsity": 0.7}, "sensitivity", "block-output"),
        ({"sparsity": 0.7, "method": "sparsegpt", "refit": True}, "sensitivity", "block-output"),
        ({"sparsity": 0.7, "method": "wanda"}, "sensitivity", "equal"),
        ({"sparsity": 0.7, "method": "dsnot-sparsegpt", "refit": True}, "sensitivity", "equal"),
        ({"sparsity": 0.7, "channels": "equal"}, "sensitivity", "equal"),
        ({"pattern": "2:4"}, "uniform", "equal"),
    ],
    ids=str,
)
def test_a_preset_leaves_out_what_would_have_nothing_to_move(asked: dict[str, Any], budget: str, channels: str) -> None:
    settings = load_prune_config(None, {"model": "m", "preset": "best", **asked})
    assert (settings.budget, settings.channels) == (budget, channels)
    settings.resolve()


def test_what_is_asked_for_outright_is_refused_all_the_same() -> None:
    asked = {"model": "m", "sparsity": 0.7, "method": "wanda", "preset": "best", "channels": "block-output"}
    settings = load_prune_config(None, asked)
    with pytest.raises(ConfigError, match="wanda prunes every row to the same sparsity: use equal"):
        settings.resolve()


def test_a_saved_preset_reads_back_as_it_was(tmp_path: Path) -> None:
    settings = load_prune_config(None, {"model": "m", "sparsity": 0.7, "preset": "best", "target": "dense"})
    (tmp_path / "alps.yaml").write_text(settings.to_yaml())
    assert load_prune_config(tmp_path / "alps.yaml", {}) == settings


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_a_preset_in_python_is_that_of_the_command(
    stories: Path, english_file: Path, tmp_path: Path, pattern: str
) -> None:
    flag = "--pattern" if ":" in pattern else "--sparsity"
    more = (flag, pattern, "--preset", "best", "--match", "2", "--match-target", "0.7")
    done = CliRunner().invoke(app, _arguments(stories, english_file, tmp_path / "command", *more))
    assert done.exit_code == 0, done.output
    settings: dict[str, Any] = {"calibration": english_file, "samples": 6, "seqlen": 32, "out": tmp_path / "python"}
    report = alps.prune(stories, pattern, preset="best", match=2, match_target=0.7, **settings)
    assert report.reconstructions and all(match.after <= match.before for match in report.reconstructions)
    for name, tensor in load_file(tmp_path / "command" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "python" / "model.safetensors")[name]), name


def test_a_preset_in_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Preset 'bets' is unknown: choose one of paper, fast, best\. Did you mean"):
        alps.prune("nowhere", 0.5, preset="bets", out=tmp_path / "out")


@pytest.mark.parametrize(("written", "share"), [("pruned", 0.0), ("dense", 1.0), ("0.25", 0.25), (0.5, 0.5), (1, 1.0)])
def test_targets(written: str | float, share: float) -> None:
    assert parse_target(written) == share


@pytest.mark.parametrize("written", ["half", "nan", "1.01", -0.1, ""])
def test_targets_that_cannot_be_are_refused(written: str | float) -> None:
    with pytest.raises(ConfigError, match=f"Target '{written}' is wrong: write pruned, dense"):
        parse_target(written)


def _arguments(stories: Path, english_file: Path, out: Path, *more: str) -> list[str]:
    windows = ["--calibration", str(english_file), "--samples", "6", "--seqlen", "32"]
    return ["prune", str(stories), str(out), *windows, *more]


def test_the_best_preset_from_end_to_end(stories: Path, english_file: Path, tmp_path: Path) -> None:
    reports = {}
    for preset in ("paper", "best"):
        out = tmp_path / preset
        done = CliRunner().invoke(app, _arguments(stories, english_file, out, "--sparsity", "0.6", "--preset", preset))
        assert done.exit_code == 0, done.output
        reports[preset] = json.loads((out / "report.json").read_text())
        # What is printed of the time is all of it, in the order of the work.
        printed = re.search(r"s \((load .*)\); peak", done.output)
        assert printed is not None
        told = dict(part.split() for part in printed[1].split(", "))
        seconds = reports[preset]["seconds"]
        assert 0.7 * seconds["total"] < sum(map(float, told.values())) < seconds["total"] + 0.05 * len(told)
        assert ("budget" in told, "match" in told) == (preset == "best",) * 2 and list(told)[-1] == "save"
    plain, best = reports["paper"], reports["best"]
    assert (
        best["summary"]["zeros"]
        == plain["summary"]["zeros"]
        == sum(round(0.6 * site["entries"]) for site in plain["layers"])
    )
    stored = load_file(tmp_path / "best" / "model.safetensors")
    shares = []
    for site in best["layers"]:
        zeros = int((stored[f"{site['name']}.weight"] == 0).sum())
        assert zeros == site["zeros"]
        shares.append(zeros / site["entries"])
    assert max(shares) - min(shares) > 0.05
    assert len(best["reconstructions"]) == 5 and plain["reconstructions"] == []
    assert all(match["after"] <= match["before"] for match in best["reconstructions"])
    assert {"match", "budget"} <= set(best["seconds"]) and "match" not in plain["seconds"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--sparsity", "0.6", "--preset", "bets"), "Did you mean 'best'"),
        (("--sparsity", "0.6", "--order", "backwards"), "Setting 'order'"),
        (("--sparsity", "0.6", "--target", "2"), "Target '2' is wrong"),
        (("--sparsity", "0.6", "--match", "-1"), "Setting 'match'"),
        (("--sparsity", "0.6", "--match", "1", "--match-target", "near"), "Match target 'near' is wrong"),
        (("--sparsity", "0.6", "--match-target", "0.4"), "Match target '0.4' aims at nothing"),
        (("--sparsity", "0.6", "--budget", "lots"), "Allocation 'lots' is unknown"),
        (("--pattern", "2:4", "--budget", "sensitivity"), "moves zeros between layers"),
    ],
    ids=str,
)
def test_wrong_choices_are_one_sentence(
    stories: Path, english_file: Path, tmp_path: Path, flags: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        CliRunner().invoke(app, _arguments(stories, english_file, tmp_path / "out", *flags), catch_exceptions=False)
    assert not (tmp_path / "out").exists()
