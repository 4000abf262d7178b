"""Finding the decoder blocks and their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks, on_device

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


class _Scaled(nn.Module):
    """Block of another class than the others, with one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


def test_blocks_may_be_of_several_classes_and_need_no_layers() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), _Scaled(), nn.Identity(), _Scaled()])
    model = nn.ModuleDict({"layers": layers, "others": nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])})
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"layers.{i}" for i in range(4)]
    assert [[site.name for site in block.sites] for block in blocks] == [
        ["layers.0.0"],
        ["layers.1.inner"],
        [],
        ["layers.3.inner"],
    ]


def test_layers_with_a_shared_weight_are_no_sites() -> None:
    """As in Zamba, whose attention is the same in several layers; a weight may also be shared inside a block."""
    first, second, third = (_Scaled() for _ in range(3))
    for block in (first, second, third):
        block.own = nn.Linear(8, 8)
    second.inner = first.inner  # one module in two blocks
    third.again = nn.Linear(8, 8)
    third.again.weight = third.inner.weight  # one parameter in two modules
    blocks = find_blocks(nn.ModuleDict({"layers": nn.ModuleList([first, second, third])}))
    assert [[site.name for site in block.sites] for block in blocks] == [[f"layers.{i}.own"] for i in range(3)]


def test_a_clone_has_the_sites_of_its_block_and_weights_of_its_own(tiny_model: Callable[..., Any]) -> None:
    block = find_blocks(tiny_model("llama"))[1]
    some = block.with_sites(block.sites[2:4])
    clone = some.clone()
    assert [site.name for site in clone.sites] == [site.name for site in some.sites]
    for site, original in zip(clone.sites, some.sites, strict=True):
        assert torch.equal(site.read(), original.read()) and site.module in set(clone.module.modules())
        site.write(torch.zeros(site.shape))
        assert bool(original.read().any())


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
