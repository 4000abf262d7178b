"""Finding the decoder blocks and naming what lies outside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.blocks import dense_parameters, find_blocks, on_device

_OPT_SITES = {
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.q_proj": (32, 32),
    "self_attn.out_proj": (32, 32),
    "fc1": (64, 32),
    "fc2": (32, 64),
}
_EXPECTED = {
    "llama": (
        "model.layers",
        {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (44, 32),
            "mlp.up_proj": (44, 32),
            "mlp.down_proj": (32, 44),
        },
    ),
    "opt": ("model.decoder.layers", _OPT_SITES),
    "opt-postnorm": ("model.decoder.layers", _OPT_SITES),
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        },
    ),
}
_DENSE = {
    "llama": {
        "model.embed_tokens.weight": "embedding or output head",
        "lm_head.weight": "embedding or output head",
    },
    "opt": {
        "model.decoder.embed_tokens.weight": "embedding or output head",
        "model.decoder.embed_positions.weight": "embedding or output head",
        "model.decoder.project_in.weight": "outside the decoder blocks",
        "model.decoder.project_out.weight": "outside the decoder blocks",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding or output head",
        "transformer.wpe.weight": "embedding or output head",
    },
}
_DENSE["opt-postnorm"] = _DENSE["opt"]


def test_blocks_and_sites_of_every_kind(tiny_model: Callable[..., Any], kind: str) -> None:
    prefix, sites = _EXPECTED[kind]
    model = tiny_model(kind)
    blocks = find_blocks(model)
    assert [(block.index, block.name) for block in blocks] == [(i, f"{prefix}.{i}") for i in range(3)]
    for block in blocks:
        assert block.module is model.get_submodule(block.name)
        assert {site.name: site.shape for site in block.sites} == {
            f"{block.name}.{name}": shape for name, shape in sites.items()
        }
        assert len(block.sites) == len(sites)
        for site in block.sites:
            assert site.module is model.get_submodule(site.name)
            assert site.kind == site.name.split(".")[-1]
            assert site.parameter_name in dict(model.named_parameters())


def test_dense_parameters_are_everything_else_with_two_dimensions(tiny_model: Callable[..., Any], kind: str) -> None:
    model = tiny_model(kind)
    pruned = {site.parameter_name for block in find_blocks(model) for site in block.sites}
    rows = dense_parameters(model, pruned)
    assert {row.name: row.reason for row in rows} == _DENSE[kind]
    assert all(row.shape == tuple(model.get_parameter(row.name).shape) for row in rows)


def test_a_linear_left_unpruned_inside_a_block_is_listed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    pruned = {site.parameter_name for block in find_blocks(model) for site in block.sites}
    skipped = "model.layers.1.mlp.up_proj.weight"
    reasons = {row.name: row.reason for row in dense_parameters(model, pruned - {skipped})}
    assert reasons[skipped] == "not a linear map that received calibration inputs"


def test_fused_experts_are_listed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.experts = nn.Parameter(torch.zeros(4, 8, 8))
    pruned = {site.parameter_name for block in find_blocks(model) for site in block.sites}
    rows = {row.name: row for row in dense_parameters(model, pruned)}
    assert rows["model.layers.2.mlp.experts"].shape == (4, 8, 8)
    assert "fused 3-D" in rows["model.layers.2.mlp.experts"].reason


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])}),
        nn.ModuleDict({"none": nn.ModuleList([])}),
    ],
    ids=["no list", "a list without linear maps", "an empty list"],
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=f"No list of decoder blocks .* in {type(model).__name__}"):
        find_blocks(model)


def test_the_longest_list_wins_and_equal_ones_are_told_apart_by_size() -> None:
    def layers(count: int, width: int) -> nn.ModuleList:
        return nn.ModuleList([nn.Sequential(nn.Linear(width, width)) for _ in range(count)])

    longer = nn.ModuleDict({"short": layers(2, 64), "long": layers(3, 4)})
    assert [block.name for block in find_blocks(longer)] == ["long.0", "long.1", "long.2"]
    equal = nn.ModuleDict({"small": layers(2, 4), "large": layers(2, 8)})
    assert [block.name for block in find_blocks(equal)] == ["large.0", "large.1"]


def test_experts_nested_in_a_block_are_not_taken_for_the_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(8, 8)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["layers.0", "layers.1"]
    assert [len(block.sites) for block in blocks] == [6, 6]


def test_a_block_returns_to_its_device_with_its_changes(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = find_blocks(tiny_model("llama"))[1]
    devices: list[torch.device] = []
    monkeypatch.setattr(block.module, "to", devices.append)  # meta tensors could not return
    with pytest.raises(KeyError), on_device(block, torch.device("meta")):
        assert devices == [torch.device("meta")]
        block.sites[0].write(torch.ones(block.sites[0].shape))
        raise KeyError
    assert devices == [torch.device("meta"), torch.device("cpu")]
    assert bool((block.sites[0].read() == 1).all())
