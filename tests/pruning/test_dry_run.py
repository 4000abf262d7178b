"""Dry runs: exact counts and sizes, estimates that follow their formulas, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alps.cli.main import app
from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel, open_model
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import find_blocks
from alps.pruning.dry_run import _seconds, forecast, forecast_summary, peak
from alps.pruning.time_estimate import BlockTimes
from alps.solvers.patterns import SemiStructured, Unstructured
from helpers.runs import make_context, make_recipe

_HALF = Unstructured(0.5)


def test_counts_and_sizes_are_exact(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alps.data.loaded_model.load_tokenizer", lambda name: None)
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    loaded = open_model(str(tmp_path))
    recipe = make_recipe("alps", _HALF, dense_target=0.4, true_sequential=True)
    found = forecast(loaded, recipe, make_context(), samples=10, seqlen=16)
    kinds = {kind.name: (kind.shape, kind.count) for kind in found.kinds}
    assert kinds == {
        "q_proj": ((32, 32), 3),
        "k_proj": ((16, 32), 3),
        "v_proj": ((16, 32), 3),
        "o_proj": ((32, 32), 3),
        "gate_proj": ((44, 32), 3),
        "up_proj": ((44, 32), 3),
        "down_proj": ((32, 44), 3),
    }
    weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32
    assert (found.blocks, found.sites, found.entries) == (3, 21, 3 * weights)
    assert found.streamed and {name for name, _ in found.dense} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.memory == {
        "block": 2 * 2 * (weights + 2 * 32),  # dense and pruned, bfloat16, with both norms
        "solver": 4 * (6 * 44 * 32 + 4 * 32**2),
        "outside the blocks": 2 * (2 * 64 * 32 + 32),
        "statistics": 2 * 8 * (3 * 32**2 + 44**2),
        "activations": 2 * 160 * 32 * 2,
        "inputs of the dense block": 160 * (3 * 32 + 44) * 2,
        "cached outputs": 160 * (32 + 44) * 2,
    }
    at_work = sum(found.memory.values()) - found.memory["outside the blocks"]
    assert peak(found.memory, True) == at_work
    # Reconstruction changes the MLP: its outputs are not cached for a pass that starts at the beginning of the block.
    recipe = replace(recipe, reconstruction=ReconstructionParameters(epochs=1))
    for limit, size in ((None, 160 * 32 * 2), (160 * 32 * 2 - 1, 0)):
        context = make_context(activation_bytes=limit)
        assert forecast(loaded, recipe, context, samples=10, seqlen=16).memory["cached outputs"] == size
    recipe = replace(recipe, reconstruction=ReconstructionParameters(epochs=1, max_distinct_tokens=40))
    memory = forecast(loaded, recipe, make_context(), samples=10, seqlen=16).memory
    assert memory["activations"] == (160 + 40) * 32 * 2
    assert memory["inputs of the dense block"] == 40 * (3 * 32 + 44) * 2
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_seconds_follow_the_formulas(tiny_model: Callable[..., Any]) -> None:
    blocks = find_blocks(tiny_model("llama"))
    recipe = make_recipe("alps", _HALF, reconstruction=ReconstructionParameters(epochs=2), allocation="sensitivity")
    times = BlockTimes(forward=1.0, observe=3.0, advance=0.75, gram=0.5, solve=10.0, cost=5.0)
    found = _seconds(blocks, recipe, 1000, times)
    cost = sum(m * n * n + n**3 for block in blocks for m, n in (site.shape for site in block.sites))
    assert found == {
        "forward": 4.75 * 1000 * 3,
        "gram": 0.5 * 1000 * 3,
        "solve": 2.0 * cost,
        "reconstruct": 6.5 * 3000,
        "allocation": 2.5 * 1000 * 3 + 512 * ((3 + 2 + 1) + 3 * (7 + 3)),
    }
    recipe = replace(recipe, reconstruction=ReconstructionParameters(epochs=2, target=0.4), dense_target=0.4)
    found = _seconds(blocks, recipe, 1000, times)
    assert (found["reconstruct"], found["forward"]) == (7.5 * 3000, 3.75 * 3000)
    recipe = replace(recipe, reconstruction=ReconstructionParameters(epochs=2, max_tokens=500))
    assert _seconds(blocks, recipe, 1000, times)["reconstruct"] == (3 * 0.5 + 0.5) * 3000
    # The dense block runs on a quarter of the tokens: 0.25 of a pass, where the observed window had a whole one.
    parameters = ReconstructionParameters(epochs=2, target=0.4, max_distinct_tokens=250)
    for dense_target, forward in ((0.0, 3.75 + 0.25), (0.4, 3.75 - 0.75)):
        found = _seconds(blocks, replace(recipe, reconstruction=parameters, dense_target=dense_target), 1000, times)
        assert found["forward"] == forward * 3000
        assert found["reconstruct"] == (3 * 0.5 + 0.5 * 0.25 + 0.25) * 3000


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_in_memory_is_left_as_it_was(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = make_recipe("sparsegpt", _HALF, dense_target=1.0)
    found = forecast(LoadedModel("tiny", model, None), recipe, make_context(), samples=4, seqlen=16)
    assert not found.streamed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "the whole model is held in memory" in forecast_summary(found)


def test_a_method_without_inputs_has_no_times(tiny_model: Callable[..., Any]) -> None:
    recipe = make_recipe("magnitude", _HALF, measure_error=False)
    found = forecast(LoadedModel("tiny", tiny_model("llama"), None), recipe, make_context(), samples=4, seqlen=16)
    assert found.seconds == {} and "Time" not in forecast_summary(found)


def test_what_a_run_would_refuse_is_refused(tiny_model: Callable[..., Any]) -> None:
    loaded = LoadedModel("tiny", tiny_model("llama"), None)
    with pytest.raises(ConfigError, match="does not divide"):
        forecast(loaded, make_recipe("wanda", SemiStructured(4, 8)), make_context(), samples=4, seqlen=16)
    with pytest.raises(ConfigError, match="longer than"):
        forecast(loaded, make_recipe("wanda", _HALF), make_context(), samples=4, seqlen=1000)


def test_the_command_prints_and_writes_nothing(stories: Path, english_file: Path, tmp_path: Path) -> None:
    settings = ["--sparsity", "0.7", "--preset", "best", "--calibration", str(english_file), "--seqlen", "64"]
    done = CliRunner().invoke(app, ["prune", str(stories), str(tmp_path / "out"), *settings, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "35 linear layers with 226,560 weights in 5 blocks" in done.stdout
    for words in ("Memory: about", "reconstruct", "allocation", "Nothing was pruned or written."):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
