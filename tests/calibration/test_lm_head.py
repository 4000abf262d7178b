"""The LM head: logits of the last hidden states, and divergences caused by changes inside blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.lm_head import Change, LMHead, measure_divergences
from alps.models.blocks import find_blocks
from alps.models.sites import Site

_CPU = torch.device("cpu")


def test_divergences_are_those_of_whole_models(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model, dense = tiny_model(kind), tiny_model(kind)
    blocks = find_blocks(model)

    @contextmanager
    def scaled(site: Site, factor: float) -> Iterator[None]:
        before = site.read().clone()
        site.write(before * factor)
        yield
        site.write(before)

    chosen = [blocks[0].sites[-1], blocks[1].sites[0], blocks[1].sites[2], blocks[2].sites[1]]
    changes: list[list[Change]] = [
        [partial(scaled, site, 0.3) for site in chosen if site in block.sites] for block in blocks
    ]
    changes[0].append(partial(scaled, chosen[0], 1.0))
    divergences = measure_divergences(model, blocks, ids, changes, device=_CPU)
    assert [len(values) for values in divergences] == [2, 2, 1] and divergences[0].pop() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        before = dense(input_ids=ids).logits.double().log_softmax(-1)
    for site, value in zip(chosen, [value for values in divergences for value in values], strict=True):
        with scaled(site, 0.3), torch.no_grad():
            after = model(input_ids=ids).logits.double().log_softmax(-1)
        expected = float((before.exp() * (before - after)).sum(-1).mean())
        assert expected > 1e-4 and value == pytest.approx(expected, rel=0.05)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_head_is_what_follows_the_blocks(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, len(ids))
    for block in blocks:
        inputs.advance(block.index, block.module, _CPU)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(LMHead(model, blocks)(inputs.hidden[0], ids), expected, rtol=1e-4, atol=1e-5)


def test_all_but_the_blocks_is_brought_to_the_heads_device_and_back(
    tiny_model: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    inside = {id(tensor) for block in blocks for tensor in (*block.module.parameters(), *block.module.buffers())}
    tensors = [*model.parameters(), *model.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    # Stands in for another device, on any machine: a copy at another place.
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _device: tensor.clone())
    with pytest.raises(RuntimeError, match="stop"), LMHead(model, blocks).on(_CPU):
        moved = [tensor.data_ptr() != place for tensor, place in zip(tensors, places, strict=True)]
        assert moved == [id(tensor) not in inside for tensor in tensors] and any(moved) and not all(moved)
        raise RuntimeError("stop")
    assert [tensor.data_ptr() for tensor in tensors] == places
