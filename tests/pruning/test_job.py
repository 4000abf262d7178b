"""Runs by name: what is refused before the model is loaded, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.core.errors import AlpsError, CheckpointError, ConfigError
from alps.core.progress import NoProgress
from alps.pruning.config import PruneConfig
from alps.pruning.job import PruneJob, prune_checkpoint
from alps.pruning.layer_solver import LayerProblem
from alps.solvers.alps import Alps
from alps.solvers.base import Solution
from alps.solvers.wanda import Wanda
from helpers.model_comparison import same_models, tree


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"samples": 5000}, ConfigError, "5000 are needed"),
        ({"seqlen": 129}, ConfigError, "longer than the 128 this model takes"),
        ({"calibration": "absent.txt"}, ConfigError, "is neither a file nor"),
        ({"pattern": "2:4"}, ConfigError, "either --sparsity"),
        ({"pattern": alps.SemiStructured(2, 4)}, ConfigError, "either a sparsity or a pattern"),
        ({"method": alps.Wanda(), "effort": "high"}, ConfigError, "set them on the method object"),
        ({"sparsity": None, "pattern": "4:8"}, ConfigError, r"does not divide .*down_proj \(44\)"),
        ({"method": "apls"}, ConfigError, "Did you mean 'alps'"),
        ({"device": "gpu"}, ConfigError, "Device 'gpu'"),
        ({"dtype": "int8"}, ConfigError, "Dtype 'int8' is unknown"),
        ({"out": None}, ConfigError, "needs `out`"),
        ({"samples": 0}, ConfigError, "samples"),
        ({"seqlen": 0}, ConfigError, "seqlen"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_leaves_nothing_behind(
    checkpoint: Path,
    english_file: Path,
    tmp_path: Path,
    change: dict[str, Any],
    error: type[AlpsError],
    complaint: str,
) -> None:
    arguments = {"sparsity": 0.6, "calibration": english_file, "samples": 4, "seqlen": 32, "out": tmp_path / "a" / "b"}
    with pytest.raises(error, match=complaint):
        alps.prune(checkpoint, **{**arguments, **change})
    assert tree(tmp_path) == []


def test_a_checkpoint_that_is_broken_leaves_nothing_behind(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path, tmp_path: Path
) -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    word_tokenizer.save_pretrained(tmp_path / "nan")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight of .* holds NaN"):
        alps.prune(tmp_path / "nan", sparsity=0.5, calibration=english_file, samples=4, seqlen=32, out=tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["full", "file", "/proc/alps/out"])
@pytest.mark.parametrize("given", ["a name", "settings", "a model"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    checkpoint: Path,
    tiny_model: Callable[..., Any],
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    given: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    before, out, model = tree(tmp_path), tmp_path / place, tiny_model("llama")

    def too_early(*_: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("alps.pruning.run_inputs.open_model", too_early)
    with pytest.raises(CheckpointError, match=r"not empty|is a file|cannot be created"):
        if given == "a name":
            alps.prune(checkpoint, sparsity=0.5, out=out)
        elif given == "settings":
            settings = PruneConfig(model=str(checkpoint), sparsity=0.5)
            prune_checkpoint(settings, out, NoProgress())
        else:
            alps.prune(model, sparsity=0.5, calibration=ids, out=out)
    assert tree(tmp_path) == before
    assert same_models(model, tiny_model("llama")), "a model in memory was pruned for nothing"


def test_no_nan_reaches_the_journal(
    checkpoint: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = Wanda.solve

    def broken(self: Wanda, *arguments: Any) -> Any:
        solution = solve(self, *arguments)
        solution.weight[0, 0] = torch.nan
        return solution

    def unchecked(problem: LayerProblem, solution: Solution) -> Tensor:
        return problem.site.write(solution.weight)

    monkeypatch.setattr(LayerProblem, "commit", unchecked)
    monkeypatch.setattr(LayerProblem, "errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(Wanda, "solve", broken)
    settings = PruneConfig(
        model=str(checkpoint), sparsity=0.6, method="wanda", calibration=str(english_file), samples=4, seqlen=32
    )
    with pytest.raises(CheckpointError, match=r"Tensor .*weight for '.*out\.partial' has become NaN"):
        prune_checkpoint(settings, tmp_path / "out", NoProgress())
    assert tree(tmp_path) == []


def test_the_fingerprint_names_what_the_weights_depend_on(ids: Tensor) -> None:
    config = PruneConfig(model="m", sparsity=0.6, method="wanda", samples=7)
    entries = PruneJob(config=config).fingerprint()
    assert (entries["sparsity"], entries["method"], entries["samples"]) == ("0.6", "wanda", "7")
    assert not {"model", "device", "offload"} & entries.keys()
    constants = {"reconstruct_steps", "dense_target_prior_tokens", "allocation_tokens", "row_weight_tokens"}
    assert not constants & entries.keys()
    best = PruneConfig(model="m", sparsity=0.6, preset="best")
    assert constants <= PruneJob(config=best).fingerprint().keys()
    other = PruneJob(config=config, method=Alps(damping=0.02), token_ids=ids).fingerprint()
    assert "damping=0.02" in other["method"] and other["samples"] == other["seqlen"] == other["seed"] == "token ids"


def test_a_job_saves_its_settings_only_where_they_say_all(ids: Tensor) -> None:
    config = PruneConfig(model="m", sparsity=0.6)
    assert PruneJob(config=config).config_to_save is config
    assert PruneJob(config=config, method=Alps()).config_to_save is None
    assert PruneJob(config=config, token_ids=ids).config_to_save is None
