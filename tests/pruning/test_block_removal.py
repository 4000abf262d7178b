"""The greedy choice of blocks equals a loop that removes modules from copies and compares logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.data.loaded_model import open_model
from alps.models.blocks import find_blocks
from alps.pruning.block_removal import REMOVAL_TOKENS, choose_removals, removable
from helpers.model_comparison import same, weights

Tiny = Callable[..., Any]
_CPU = torch.device("cpu")


def _tall(tiny_model: Tiny, kind: str) -> Any:
    """A tiny model with its blocks twice, the second time with other weights."""
    model = tiny_model(kind)
    stack = model.model.layers if kind == "llama" else model.transformer.h
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for block in list(stack):
            other = copy.deepcopy(block)
            for parameter in other.parameters():
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            stack.append(other)
    name = "num_hidden_layers" if kind == "llama" else "n_layer"
    setattr(model.config, name, len(stack))
    for number, block in enumerate(stack):
        (block.self_attn if kind == "llama" else block.attn).layer_idx = number
    return model


def _without(model: Any, removed: list[int]) -> Any:
    """A copy of a model without some of its blocks."""
    small = copy.deepcopy(model)
    parent, name = (small.model, "layers") if hasattr(small, "model") else (small.transformer, "h")
    kept = [block for number, block in enumerate(getattr(parent, name)) if number not in removed]
    setattr(parent, name, torch.nn.ModuleList(kept))
    small.config.num_hidden_layers = len(kept)
    return small


def _divergence(model: Any, small: Any, ids: Tensor) -> float:
    with torch.no_grad():
        dense, shrunk = (part(input_ids=ids, use_cache=False).logits.double() for part in (model, small))
    p = dense.log_softmax(dim=-1)
    return float((p.exp() * (p - shrunk.log_softmax(dim=-1))).sum(dim=-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_rounds_choose_what_a_loop_over_copies_chooses(tiny_model: Tiny, ids: Tensor, kind: str) -> None:
    model = _tall(tiny_model, kind)
    before, done = copy.deepcopy(weights(model)), list[int]()
    removals = choose_removals(
        model, find_blocks(model), ids, 2, device=_CPU, on_block_done=lambda block: done.append(block.index)
    )
    removed = list[int]()
    for removal in removals:
        measured = {
            index: _divergence(model, _without(model, [*removed, index]), ids)
            for index in range(2, 4)
            if index not in removed
        }
        best = min(measured, key=lambda index: measured[index])
        assert removal.block == best and removal.kl == pytest.approx(measured[best], rel=1e-4)
        removed.append(best)
    assert sorted(removed) == [2, 3]
    assert done == [*range(6)] * 2
    assert same(before, weights(model))


def test_a_checkpoint_that_is_not_in_memory_gives_the_same_choice(stories: Any, ids: Tensor) -> None:
    """One candidate is left between the protected ends of five blocks, and its divergence is measured."""
    opened = open_model(str(stories))
    blocks = opened.blocks()
    assert blocks[0].store is not None
    (removal,) = choose_removals(opened.model, blocks, ids, 1, device=_CPU)
    assert removal.block == 2
    whole = type(opened.model).from_pretrained(stories).eval()
    assert removal.kl == pytest.approx(_divergence(whole, _without(whole, [2]), ids), rel=1e-4)
    assert all(parameter.is_meta for block in blocks for parameter in block.module.parameters())


def test_the_ends_are_protected() -> None:
    assert removable(6) == [2, 3]
    assert removable(30)[0] == 2 and removable(30)[-1] == 27
    assert removable(4) == removable(1) == []


def test_no_more_windows_than_needed_are_read(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = _tall(tiny_model, "llama"), list[int]()
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setattr("alps.pruning.block_removal.REMOVAL_TOKENS", 40)
    monkeypatch.setattr(model, "forward", forward)
    windows = torch.randint(2, 64, (9, 16), generator=torch.Generator().manual_seed(0))
    choose_removals(model, find_blocks(model), windows, 1, device=_CPU)
    assert max(rows) == 2
    assert REMOVAL_TOKENS >= 1024
