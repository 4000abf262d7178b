"""Tests of the plan of what stays packed: every packed tensor has a place, or a reason for being dense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alps.inference.packing_plan import READ_BY_CODE, plan_packing
from alps.models.recorded_tensor import RecordedTensor
from helpers.decoders import decoder


def record(model: nn.Module) -> nn.Module:
    """Replace the parameters of a copy of a model by records of tensors of the same names."""
    recorded = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        stored = RecordedTensor.stored(name, list(parameter.shape), parameter.dtype, parameter.detach().clone)
        recorded.get_submodule(owner)._parameters[attribute] = nn.Parameter(stored, requires_grad=False)
    if isinstance(recorded, PreTrainedModel):
        recorded.tie_weights()
    return recorded


@pytest.mark.parametrize("kind", ["gpt2", "jamba"])
def test_every_packed_tensor_has_one_place(kind: str) -> None:
    model = record(decoder(kind))
    packed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    plan = plan_packing(model, packed.__contains__, lambda name: name.endswith("dt_proj.weight"))
    experts = {
        f"{name}.{place}" for name, module in model.named_modules() for at, place in plan.experts if at is module
    }
    places = [*plan.layers.values(), *plan.dense, *experts]
    assert sorted(places) == sorted(packed)
    if kind == "gpt2":
        assert plan.dense["transformer.wte.weight"] == "it is tied to another weight"
        assert plan.dense["transformer.wpe.weight"] == "Embedding is no linear layer"
        assert len(plan.layers) == 12 and len(plan.dense) == 2
    else:
        assert plan.dense["model.layers.0.mamba.dt_proj.weight"] == READ_BY_CODE
        assert plan.dense["model.layers.0.mamba.A_log"] == "JambaMambaMixer is no linear layer"
        assert len(plan.experts) == 4 and all(not name.endswith(("up_proj", "down_proj.weight")) for name in plan.dense)


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.plain, self.split = _Scaled(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)


def test_other_products_and_computed_weights_are_dense() -> None:
    model = record(_Model())
    fused = RecordedTensor.stored("fused", [8, 8], torch.float32, lambda: torch.ones(8, 8))
    model.get_submodule("split")._parameters["weight"] = nn.Parameter(fused.chunk(2)[1], requires_grad=False)
    plan = plan_packing(model, lambda name: not name.endswith("bias"))
    assert plan.layers == {model.get_submodule("plain"): "plain.weight"} and not plan.experts
    assert plan.dense == {
        "scaled.weight": "_Scaled computes something else than the product with it",
        "fused": "it is computed from the tensors of the checkpoint",
    }
