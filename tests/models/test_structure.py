"""Tests of structures that are read from models, and of targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.meta_model import empty_model
from alps.models.structure import Structure, Target, read_structure
from helpers.decoders import DENSE, MOE, decoder

_LLAMA = Structure(blocks=4, hidden=32, mlp_width=48, heads=4, kv_heads=2, head_dim=8)


def test_structures_are_read_from_models_without_weights() -> None:
    model = decoder("llama")
    assert read_structure(model, find_blocks(model)) == _LLAMA
    empty = empty_model(model.config, torch.bfloat16)
    assert read_structure(empty, find_blocks(empty)) == _LLAMA
    model = decoder("gpt2")
    assert read_structure(model, find_blocks(model)) == Structure(3, 32, 128, heads=4, kv_heads=4, head_dim=8)
    model = decoder("deepseek_v3")
    structure = read_structure(model, find_blocks(model))
    assert (structure.mlp_width, structure.experts, structure.expert_width, structure.shared_width) == (48, 4, 24, 24)
    assert structure.experts_per_token == 2
    model = decoder("falcon-new")
    assert read_structure(model, find_blocks(model)).kv_heads == 2
    model = decoder("falcon")
    assert read_structure(model, find_blocks(model)).kv_heads == 1


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "deepseek_v3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*DENSE, *MOE))]
)
def test_the_cache_holds_as_many_values_as_a_structure_says(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    structure = read_structure(model, find_blocks(model))
    with torch.no_grad():
        cache = model(input_ids=ids[:1, :4], use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    repeats = structure.group if kind == "falcon-new" else 1  # transformers caches a copy for each query head
    assert values == 4 * structure.blocks * structure.cached_values * repeats


@pytest.mark.parametrize(
    ("target", "kv_heads", "expected"),
    [
        (Target(), 2, (48, 4, 2)),
        (Target(mlp_width=32), 2, (32, 4, 2)),
        (Target(heads=2), 2, (48, 2, 2)),
        (Target(kv_heads=1), 2, (48, 2, 1)),
        (Target(heads=1, kv_heads=1), 2, (48, 1, 1)),
        (Target(heads=3), 4, (48, 3, 3)),
        (Target(kv_heads=3), 4, (48, 3, 3)),
    ],
)
def test_numbers_that_are_left_out_follow(target: Target, kv_heads: int, expected: tuple[int, ...]) -> None:
    complete = target.complete(Structure(4, 32, mlp_width=48, heads=4, kv_heads=kv_heads, head_dim=8))
    assert (complete.mlp_width, complete.heads, complete.kv_heads) == expected
    assert complete.kept_blocks == (0, 1, 2, 3)


def test_blocks_of_several_shapes_are_refused() -> None:
    model = decoder("llama")
    blocks = find_blocks(model)
    other = decoder("mistral").model.layers[0]
    other.mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    blocks[2].module.mlp = other.mlp
    with pytest.raises(UnsupportedModel, match=r"model.layers.2.mlp.down_proj.weight has the shape \[32, 40\], unlike"):
        read_structure(model, blocks)
