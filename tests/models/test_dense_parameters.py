"""Reasons for parameters that are not pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.models.blocks import find_blocks
from alps.models.dense_parameters import dense_parameters

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
    assert reasons[skipped] == "a forward on text does not call it as a layer"


def test_fused_experts_are_listed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.experts = nn.Parameter(torch.zeros(4, 8, 8))
    pruned = {site.parameter_name for block in find_blocks(model) for site in block.sites}
    rows = {row.name: row for row in dense_parameters(model, pruned)}
    assert rows["model.layers.2.mlp.experts"].shape == (4, 8, 8)
    assert "fused 3-D" in rows["model.layers.2.mlp.experts"].reason


class _Scan(nn.Module):
    """State-space mixer in miniature: a convolution, a state matrix, tables, and a block-diagonal layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8)
        self.A_log = nn.Parameter(torch.zeros(8, 4))
        self.position_bias = nn.Parameter(torch.zeros(4, 8))
        self.head_bias = nn.Parameter(torch.zeros(2, 4))
        self.x_proj_weight = nn.Parameter(torch.zeros(2, 4, 8))
        self.grouped = _Grouped(4, 8)


class _Grouped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("ngi,goi->ngo", input.view(-1, 2, 4), self.weight.view(2, 4, 4))


class _MatrixNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scan.conv1d.weight", "convolution"),
        ("scan.A_log", "parameter of _Scan, which is no linear layer"),
        ("scan.position_bias", "parameter of _Scan, which is no linear layer"),
        ("scan.head_bias", "bias"),
        ("scan.x_proj_weight", "fused 3-D weights are not supported"),
        ("scan.grouped.weight", "_Grouped computes something else than the product of its inputs and its weight"),
        ("norm.weight", "norm"),
        ("shared.weight", "shared by several layers"),
        ("moe.gate.wg.weight", "router of a mixture of experts"),
    ],
)
def test_a_reason_says_what_a_parameter_is(tiny_model: Callable[..., Any], name: str, reason: str) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.scan, layer.norm, layer.shared, layer.again = _Scan(), _MatrixNorm(), nn.Linear(8, 8), nn.Linear(8, 8)
    layer.again.weight = layer.shared.weight
    experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    layer.moe = nn.ModuleDict({"gate": nn.ModuleDict({"wg": nn.Linear(8, 3)}), "experts": experts})
    pruned = {site.parameter_name for block in find_blocks(model) for site in block.sites}
    assert {row.name: row.reason for row in dense_parameters(model, pruned)}[f"model.layers.1.{name}"] == reason
