"""A model that remembers: the same logits to the last bit, without its blocks; and what cannot be remembered."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.evaluation.cached_reference import CachedReferenceModel
from alps.models.blocks import find_blocks
from helpers.decoders import decoder


def _counted(model: nn.Module) -> list[int]:
    """Grows by one whenever a linear map of the last block runs."""
    ran: list[int] = []
    site = find_blocks(model)[-1].sites[0]
    model.get_submodule(site.name).register_forward_hook(lambda *_: ran.append(1))
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_the_models_own_to_the_bit_and_cost_no_blocks(
    tiny_model: Callable[..., Any], ids: Tensor, kind: str, dtype: torch.dtype
) -> None:
    model = tiny_model(kind, dtype)
    # The fourth has the numbers of the third in another shape.
    batches = [ids[:4], ids[4:], ids[:2], ids[:2].view(4, 8)]
    with torch.inference_mode():
        expected = [model(input_ids=one, use_cache=False).logits for one in batches]
    ran, remembered = _counted(model), CachedReferenceModel(model)
    for wanted_runs in (4, 4, 4):
        with torch.inference_mode():
            found = [remembered(input_ids=one, use_cache=False).logits for one in batches]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert len(ran) == wanted_runs
    kept = list(remembered._outputs.values())
    assert {one.dtype for one in kept} == {dtype} and sum(one.shape[:2].numel() for one in kept) == 11 * 16
    assert all(one.shape[-1] == 32 and one.device.type == "cpu" for one in kept)
    assert not remembered.training and not model.training


class _Restless(nn.Module):
    """A model whose logits depend on how often it was asked, so that its head alone cannot give them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.asked += 1
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=use_cache).logits + self.asked)


def test_what_cannot_be_replayed_is_asked_anew(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        ran, remembered = _counted(model), CachedReferenceModel(_Restless(model).eval())
        found = [remembered(input_ids=ids).logits for _ in range(3)]
    # After the first call the model runs twice more, to learn how its blocks are called and for a trial of the head.
    assert [torch.equal(one, plain + asked) for one, asked in zip(found, (1, 4, 5), strict=True)] == [True] * 3
    assert len(ran) == 3 and not remembered._outputs


@pytest.mark.parametrize("kind", ["gemma3n", "zaya", "gemma4"])
def test_models_of_other_layouts_are_cached(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    ran, remembered = _counted(model), CachedReferenceModel(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        calls = len(ran)
        assert all(torch.equal(remembered(input_ids=ids).logits, expected) for _ in range(3))
    assert len(remembered._outputs) == 1 and len(ran) <= 3 * calls


def test_the_mode_that_is_put_back_is_the_models(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("opt").train()
    remembered = CachedReferenceModel(model)
    assert remembered.training
    with pytest.raises(AssertionError):
        remembered(input_ids=ids)
    assert not CachedReferenceModel(model.eval()).training
