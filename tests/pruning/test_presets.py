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
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.presets import PRESETS
from alps.solvers.patterns import parse_pattern


def test_a_preset_yields_to_the_file_and_the_file_to_an_option(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nsparsity: 0.7\npreset: best\nreconstruct_epochs: 3\nallocation: owl\n")
    config = load_prune_config(path, {"allocation": "error"})
    chosen = (config.preset, config.true_sequential, config.reconstruct_epochs, config.allocation)
    assert chosen == ("best", True, 3, "error")
    best = PRESETS["best"]
    assert config.dense_target == best["dense_target"]
    assert config.reconstruction() == ReconstructionParameters(epochs=3, target=best["reconstruct_target"])


def test_reconstruction_aims_at_the_dense_hidden_states_by_default() -> None:
    base = {"model": "m", "sparsity": 0.5, "reconstruct_epochs": 1}
    assert load_prune_config(None, base).reconstruction() == ReconstructionParameters(target=1.0)
    given = load_prune_config(None, {**base, "reconstruct_target": 0.4}).reconstruction()
    assert given == ReconstructionParameters(target=0.4)
    assert ReconstructConfig().parameters().target == 1.0


def test_a_preset_sets_no_reconstruct_target_without_reconstruction() -> None:
    asked = {"model": "m", "sparsity": 0.5, "preset": "best"}
    expected = ReconstructionParameters(epochs=6, target=PRESETS["best"]["reconstruct_target"])
    assert load_prune_config(None, asked).reconstruction() == expected
    assert load_prune_config(None, {**asked, "reconstruct_epochs": 0}).reconstruction() is None
    with pytest.raises(ConfigError, match=r"A reconstruct target of 0\.3 has no effect"):
        load_prune_config(None, {**asked, "reconstruct_epochs": 0, "reconstruct_target": 0.3}).reconstruction()


def test_the_default_preset_is_the_paper() -> None:
    config = load_prune_config(None, {"model": "m", "sparsity": 0.5})
    assert config == load_prune_config(None, {"model": "m", "sparsity": 0.5, "preset": "paper"})
    assert (config.true_sequential, config.dense_target, config.allocation) == (False, 0.0, "uniform")
    assert config.reconstruction() is None


def test_a_config_made_in_python_has_the_settings_of_its_preset() -> None:
    for preset, settings in PRESETS.items():
        config = PruneConfig(model="m", sparsity=0.5, preset=preset)
        assert {name: getattr(config, name) for name in settings} == settings


def test_presets_are_what_the_documentation_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "presets.md").read_text()
    cells = (r"`(\w+)`[^|]*", "(on|off) ", r"([\w.]+) ", "([^|]+) ", r"(\w+)[^|]*", r"([\w-]+)[^|]*")
    row = "".join(rf"\| {cell}" for cell in cells)
    rows = re.findall(rf"^{row}\|$", text, re.MULTILINE)
    assert [cells[0] for cells in rows] == list(PRESETS)
    for name, sequential, dense_target, reconstruction, allocation, row_weights in rows:
        config = load_prune_config(None, {"model": "m", "sparsity": 0.5, "preset": name})
        parameters = config.reconstruction()
        assert (config.allocation, config.row_weights) == (allocation, row_weights)
        assert config.true_sequential == (sequential == "on") and config.dense_target == float(dense_target)
        found = "none" if parameters is None else f"{parameters.epochs} epochs, target {parameters.target}"
        assert reconstruction == found


@pytest.mark.parametrize(
    ("asked", "allocation", "row_weights"),
    [
        ({"sparsity": 0.7}, "sensitivity", "block-output"),
        ({"sparsity": 0.7, "method": "sparsegpt", "refit": True}, "sensitivity", "block-output"),
        ({"sparsity": 0.7, "method": "wanda"}, "sensitivity", "equal"),
        ({"sparsity": 0.7, "method": "dsnot-sparsegpt", "refit": True}, "sensitivity", "equal"),
        ({"sparsity": 0.7, "row_weights": "equal"}, "sensitivity", "equal"),
        ({"pattern": "2:4"}, "uniform", "equal"),
    ],
    ids=str,
)
def test_a_preset_leaves_out_what_would_have_nothing_to_move(
    asked: dict[str, Any], allocation: str, row_weights: str
) -> None:
    config = load_prune_config(None, {"model": "m", "preset": "best", **asked})
    assert (config.allocation, config.row_weights) == (allocation, row_weights)
    config.resolve()


def test_an_explicit_setting_is_refused_all_the_same() -> None:
    asked = {"model": "m", "sparsity": 0.7, "method": "wanda", "preset": "best", "row_weights": "block-output"}
    with pytest.raises(ConfigError, match="wanda prunes every row to the same sparsity: use equal"):
        load_prune_config(None, asked).resolve()


def test_a_saved_preset_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = load_prune_config(None, {"model": "m", "sparsity": 0.7, "preset": "best", "dense_target": 1.0})
    (tmp_path / "alps.yaml").write_text(config.to_yaml())
    assert load_prune_config(tmp_path / "alps.yaml", {}) == config


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_a_preset_in_python_is_that_of_the_command(
    stories: Path, english_file: Path, tmp_path: Path, pattern: str
) -> None:
    flag = "--pattern" if ":" in pattern else "--sparsity"
    more = (flag, pattern, "--preset", "best", "--reconstruct-epochs", "2", "--reconstruct-target", "0.7")
    done = CliRunner().invoke(app, _arguments(stories, english_file, tmp_path / "command", *more))
    assert done.exit_code == 0, done.output
    settings: dict[str, Any] = {"calibration": english_file, "samples": 6, "seqlen": 32, "out": tmp_path / "python"}
    report = alps.prune(
        stories,
        pattern=parse_pattern(str(pattern)),
        preset="best",
        reconstruct_epochs=2,
        reconstruct_target=0.7,
        **settings,
    )
    assert report.reconstructions and all(match.after <= match.before for match in report.reconstructions)
    for name, tensor in load_file(tmp_path / "command" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "python" / "model.safetensors")[name]), name


def test_a_preset_in_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Preset 'bets' is unknown: choose one of paper, fast, best\. Did you mean"):
        alps.prune("nowhere", sparsity=0.5, preset="bets", out=tmp_path / "out")


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
        # The phases that are printed make up the total, in the order of the work.
        printed = re.search(r"s \((load .*)\); peak", done.output)
        assert printed is not None
        phases = dict(part.split() for part in printed[1].split(", "))
        seconds = reports[preset]["seconds"]
        assert phases == {phase: f"{seconds[phase]:.1f}" for phase in phases}
        assert 0.7 * seconds["total"] < sum(seconds[phase] for phase in phases) < 1.001 * seconds["total"]
        assert ("allocation" in phases, "reconstruct" in phases) == (preset == "best",) * 2 and list(phases)[
            -1
        ] == "save"
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
    assert {"reconstruct", "allocation"} <= set(best["seconds"]) and "reconstruct" not in plain["seconds"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--sparsity", "0.6", "--preset", "bets"), "Did you mean 'best'"),
        (("--sparsity", "0.6", "--row-weights", "blok"), "Setting 'row_weights' .* choose one of equal, block-output"),
        (("--sparsity", "0.6", "--dense-target", "2"), "Setting 'dense_target'"),
        (("--sparsity", "0.6", "--reconstruct-epochs", "-1"), "Setting 'reconstruct_epochs'"),
        (("--sparsity", "0.6", "--reconstruct-target", "1.1"), "Setting 'reconstruct_target'"),
        (("--sparsity", "0.6", "--reconstruct-target", "0.4"), r"A reconstruct target of 0\.4 has no effect"),
        (("--sparsity", "0.6", "--allocation", "sensitivty"), "'sensitivty' is unknown.* Did you mean 'sensitivity'"),
        (("--pattern", "2:4", "--allocation", "sensitivity"), "moves zeros between layers"),
    ],
    ids=str,
)
def test_wrong_choices_are_one_sentence(
    stories: Path, english_file: Path, tmp_path: Path, flags: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        CliRunner().invoke(app, _arguments(stories, english_file, tmp_path / "out", *flags), catch_exceptions=False)
    assert not (tmp_path / "out").exists()
