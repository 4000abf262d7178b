"""Pruning of an open model: its windows, its mode, and what is refused before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps
from alps.core.errors import CheckpointError, ConfigError, SolveFailed
from helpers.model_comparison import same_models


def test_token_ids_calibrate_too(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2").train()
    report = alps.prune(model, pattern=alps.SemiStructured(2, 4), method=alps.Wanda(), calibration=ids)
    assert model.training, "the mode of a model in memory is the caller's"
    assert report.calibration is not None and report.calibration.seed is None
    assert (report.calibration.windows, report.calibration.seqlen) == tuple(ids.shape)


def test_a_site_without_inputs_stays_dense_and_is_listed(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.spare = nn.Linear(32, 32)
    spare = model.model.layers[1].spare.weight.detach().clone()
    report = alps.prune(model, sparsity=0.6, method="alps", calibration=ids)
    listed = {row.name: row.reason for row in report.dense if "spare" in row.name}
    reason = "a forward on text does not call it as a layer"
    assert listed == {f"model.layers.{i}.spare.weight": reason for i in range(3)}
    assert torch.equal(model.model.layers[1].spare.weight, spare) and len(report.layers) == 21


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((2, 16), 64),
        torch.full((2, 16), -1),
        torch.zeros(16, dtype=torch.int64),
        torch.zeros(0, 16, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 16),
        torch.zeros(1, 129, dtype=torch.int64),
    ],
    ids=["vocabulary", "negative", "one window flat", "no windows", "no tokens", "floats", "too long"],
)
def test_token_ids_that_cannot_be_are_refused_and_the_model_is_untouched(
    tiny_model: Callable[..., Any], bad: Tensor
) -> None:
    model = tiny_model("opt").train()
    with pytest.raises(ConfigError):
        alps.prune(model, sparsity=0.5, calibration=bad)
    assert model.training and same_models(model, tiny_model("opt"))


def test_the_mode_of_a_model_outlives_a_failure(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(1e38)  # whose outputs overflow
    with pytest.raises(SolveFailed):
        alps.prune(model, sparsity=0.5, calibration=ids)
    assert model.training


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_model_in_memory_with_nan_is_refused_before_anything_is_pruned(
    tiny_model: Callable[..., Any], ids: Tensor, name: str
) -> None:
    model, before = tiny_model("llama"), tiny_model("llama")
    for one in (model, before):
        with torch.no_grad():
            one.get_parameter(name).view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match=rf"^Tensor {name} of 'LlamaForCausalLM' holds NaN"):
        alps.prune(model, sparsity=0.5, calibration=ids)
    assert same_models(model, before)


def test_a_text_without_a_tokenizer_is_refused(tiny_model: Callable[..., Any], english_file: Path) -> None:
    with pytest.raises(ConfigError, match="needs the model's tokenizer: pass"):
        alps.prune(tiny_model("llama"), sparsity=0.5, calibration=english_file, seqlen=32)
