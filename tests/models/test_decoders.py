"""Every architecture of the table: its blocks walked one by one are the model, all its linear maps are pruned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import alps
from alps.models.blocks import dense_parameters, find_blocks
from alps.models.capture import capture
from alps.models.probe import Head
from decoders import DENSE, MOE, decoder

_CPU = torch.device("cpu")
# Their routers, and what else of a block is no linear map that is applied to tokens.
_LEFT_DENSE = {"router of a mixture of experts", "fused 3-D weights are not supported"}


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_walking_the_blocks_gives_the_logits_of_the_model(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        blocks = find_blocks(model)
        inputs = capture(model, blocks, ids, batch_size=4)
        for block in blocks:
            before = torch.cat(inputs.hidden)
            inputs.advance(block.index, block.module, _CPU)
            # A block that hardly mattered could be left out unnoticed.
            assert float((torch.cat(inputs.hidden) - before).norm() / before.norm()) > 0.05, block.name
        found = Head(model, blocks)(torch.cat(inputs.hidden), ids)
    assert float((found - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1.0)


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_all_linear_maps_are_pruned_exactly_and_the_rest_is_told(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(model, 0.6, calibration=ids)
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    pruned = {site.name for site in report.sites}
    told = {row.name: row.reason for row in report.dense}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in pruned and name.endswith(".weight"):
            zeros = int((parameter == 0).sum())
            assert zeros == round(0.6 * parameter.numel()), name
        else:
            assert torch.equal(parameter, before[name]), name
            if name.startswith(inside) and parameter.ndim > 1 and owner in maps:
                assert told[name] == "router of a mixture of experts", name
            elif name.startswith(inside) and parameter.ndim > 1:
                assert told[name] in _LEFT_DENSE or "bias" in name, name
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())
    assert report.mean_error is not None and 0 < report.mean_error < 0.2
    assert not math.isclose(float(logits.abs().max()), 0)


@pytest.mark.parametrize("kind", MOE)
def test_routers_stay_dense(kind: str) -> None:
    model = decoder(kind)
    rows = {row.name: row.reason for row in dense_parameters(model, set())}
    routers = [name for name, reason in rows.items() if reason == "router of a mixture of experts"]
    assert routers and all("gate" in name or "router" in name for name in routers), rows
    assert not any(name.endswith(("gate_proj.weight", "gate_up_proj")) for name in routers)
