"""A forward with a few tokens shows which blocks and layers are called, and no setting changes what is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import alps
from alps.calibration.block_probe import probe_blocks
from alps.core.errors import UnsupportedModel
from alps.core.progress import NoProgress
from alps.data.loaded_model import open_model
from alps.models.blocks import find_blocks
from alps.models.lazy_weights import LazyWeights
from alps.models.meta_model import open_lazy_model
from alps.pruning.config import PruneConfig
from alps.pruning.job import prune_checkpoint
from helpers.decoders import HYBRID, IMAGES, MOE, decoder
from helpers.unusual_modules import ListedExperts

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "magnitude": {"method": "magnitude", "measure_error": False},
    "magnitude with errors": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sequential": {"true_sequential": True},
    "sensitivity": {"method": "wanda", "allocation": "sensitivity"},
}


class _Reader(nn.Module):
    """MLP with a layer whose weight it reads without calling it, and with a layer that nothing uses."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.read, self.spare = mlp, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x @ self.read.weight.T)
        return output


@pytest.fixture
def reading_model(tiny_model: Callable[..., Any]) -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Reader(layer.mlp)
    return model


def _called(model: Any) -> set[str]:
    """Names of all linear layers in the blocks that a complete forward calls."""
    names: set[str] = set()
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: names.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside)
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
@pytest.mark.parametrize("kind", [*HYBRID, *IMAGES, "reader"])
def test_no_setting_changes_what_is_pruned(
    kind: str, settings: Mapping[str, Any], ids: Tensor, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("reading_model") if kind == "reader" else decoder(kind)
    found = {site.name for block in find_blocks(model) for site in block.sites}
    expected = _called(model) & found | {name for name in found if ".experts." in name}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(model, sparsity=0.5, calibration=ids, **settings)
    assert {layer.name for layer in report.layers} == expected
    zeros = 0.5 * sum(layer.entries for layer in report.layers)
    assert report.zeros == pytest.approx(zeros, abs=len(report.layers))
    told = {row.name: row.reason for row in report.dense}
    for name in found - expected:
        assert told[f"{name}.weight"] == "a forward on text does not call it as a layer"
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]), name


@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
def test_experts_of_a_list_are_pruned_though_none_of_their_tokens_comes(
    tiny_model: Callable[..., Any], settings: Mapping[str, Any], ids: Tensor
) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = ListedExperts(32, 24, 5)
    routers = [layer.mlp.dispatch.weight.clone() for layer in model.model.layers]
    report = alps.prune(model, sparsity=0.5, calibration=ids, **settings)
    names = {layer.name for layer in report.layers}
    for number in range(5):
        assert {f"model.layers.1.mlp.experts.{number}.{part}_proj" for part in ("gate", "up", "down")} <= names
    assert len(names) == len(report.layers) == 3 * (4 + 15)
    if report.layers[0].tokens is not None:
        last = [layer for layer in report.layers if ".experts.4." in layer.name]
        assert {layer.tokens for layer in last} == {0} and all(layer.pooled_tokens > 0 for layer in last)
    for layer, router in zip(model.model.layers, routers, strict=True):
        assert torch.equal(layer.mlp.dispatch.weight, router)


def test_one_block_of_every_structure_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = decoder("jamba"), list[str]()
    blocks = find_blocks(model)
    for block in blocks:
        block.module.register_forward_pre_hook(lambda _module, _args, name=block.name: runs.append(name))
    assert len(probe_blocks(model, blocks)) == len(blocks)
    kinds = {(type(block.module), len(block.sites)) for block in blocks}
    assert 1 < len(kinds) <= len(runs) < len(blocks)


def test_a_layer_that_one_block_alone_calls_is_noticed(tiny_model: Callable[..., Any]) -> None:
    """Blocks of one class may differ in a setting."""
    model = tiny_model("llama")

    class Optional(nn.Module):
        def __init__(self, mlp: nn.Module, is_used: bool) -> None:
            super().__init__()
            self.mlp, self.more, self.is_used = mlp, nn.Linear(32, 32), is_used

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.mlp(self.more(x) if self.is_used else x)
            return output

    for index, layer in enumerate(model.model.layers):
        layer.mlp = Optional(layer.mlp, is_used=index == 2)
    called = probe_blocks(model, find_blocks(model))
    assert [any("more" in site.name for site in block.sites) for block in called] == [False, False, True]


def test_blocks_that_wait_for_images_are_left_out(ids: Tensor) -> None:
    model = decoder("mllama")
    blocks = probe_blocks(model, find_blocks(model))
    crossed = model.config.cross_attention_layers
    expected = [index for index in range(model.config.num_hidden_layers) if index not in crossed]
    assert [(block.index, block.name) for block in blocks] == [
        (position, f"model.layers.{index}") for position, index in enumerate(expected)
    ]
    report = alps.prune(model, sparsity=0.5, method="wanda", calibration=ids)
    assert {layer.name.split(".")[2] for layer in report.layers} == {str(index) for index in expected}


def test_a_probe_leaves_the_model_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    probe_blocks(model, find_blocks(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.random.get_rng_state())
    assert "forward" not in model.model.layers[0].__dict__


def test_a_model_that_cannot_be_run_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise KeyError("pixel_values")

    model.model.layers[0].mlp.forward = fail
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM cannot be run on 8 token ids alone: 'pixel_values'"):
        alps.prune(model, sparsity=0.5, method="magnitude", measure_error=False)


@pytest.mark.parametrize("kind", ["jamba", "zamba", "mamba", next(iter(MOE))])
def test_a_model_in_its_files_is_pruned_like_one_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are read for the probe; weights that blocks share are read with each of them."""
    monkeypatch.setattr("alps.data.loaded_model.load_tokenizer", lambda name: None)
    model, dense = decoder(kind), str(tmp_path / "dense")
    model.save_pretrained(dense)
    assert isinstance(open_model(dense).store, LazyWeights)
    report = alps.prune(model, sparsity=0.5, method="magnitude", measure_error=False)
    settings = PruneConfig(model=dense, sparsity=0.5, method="magnitude", measure_error=False)
    streamed = prune_checkpoint(settings, tmp_path / "out", NoProgress())
    assert [layer.name for layer in streamed.layers] == [layer.name for layer in report.layers]
    again = alps.load(tmp_path / "out").model
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_model_whose_first_parameter_is_in_a_block_is_probed_from_its_files(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2, "prompt_length": 4}
    config = AutoConfig.for_model("cpmant", vocab_size=64, hidden_size=32, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    opened = open_lazy_model(str(tmp_path), None)
    assert isinstance(opened, LazyWeights) and next(opened.model.parameters()).is_meta
    probed = probe_blocks(opened.model, opened.attach_to(find_blocks(opened.model)))
    assert [len(block.sites) for block in probed] == [7, 7]
