"""Routers are recognised by their place next to experts and their shape, whatever they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alps.models.routers import find_routers, routing_parameters
from alps.models.sites import find_sites

_WIDTH, _EXPERTS = 8, 5


class _Fused(nn.Module):
    """Experts fused in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = _EXPERTS
        self.down_proj = nn.Parameter(torch.zeros(_EXPERTS, _WIDTH, 6))


def _listed() -> nn.ModuleList:
    return nn.ModuleList([_mlp() for _ in range(_EXPERTS)])


def _mlp() -> nn.ModuleDict:
    return nn.ModuleDict({"up_proj": nn.Linear(_WIDTH, 6), "down_proj": nn.Linear(6, _WIDTH)})


def _block(mixture: dict[str, nn.Module]) -> nn.Module:
    attention = nn.ModuleDict({"q_proj": nn.Linear(_WIDTH, _WIDTH), "gate": nn.Linear(_WIDTH, _WIDTH)})
    return nn.ModuleDict({"attention": attention, "mlp": nn.ModuleDict(mixture)})


class _TopKScorer(nn.Linear):
    """Router by its class alone: its outputs do not tell the number of experts."""


@pytest.mark.parametrize("experts", [_Fused, _listed], ids=["fused", "listed"])
@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("gate", nn.Linear(_WIDTH, _EXPERTS)),
        ("gate", nn.ModuleDict({"wg": nn.Linear(_WIDTH, _EXPERTS)})),
        ("gate", nn.Sequential(nn.Linear(_WIDTH, 4), nn.GELU(), nn.Linear(4, 2 * _EXPERTS))),
        ("dispatcher", nn.Linear(_WIDTH, _EXPERTS, bias=False)),
        ("scores", nn.Sequential(nn.Linear(_WIDTH, 4), nn.GELU(), nn.Linear(4, _EXPERTS))),
        ("chooser", _TopKScorer(_WIDTH, 2 * _EXPERTS)),
        ("router_gate", nn.Linear(_WIDTH, 6)),
        ("weight_of_shared", nn.Linear(_WIDTH, 1)),
        ("shared_expert_gate", nn.Linear(_WIDTH, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lies_beside_experts_and_routes_is_dense(experts: type[nn.Module], name: str, router: nn.Module) -> None:
    block = _block({name: router, "experts": experts(), "shared_expert": _mlp(), "latent": nn.Linear(_WIDTH, 3)})
    sites = {site.name for site in find_sites("layer", block)}
    assert find_routers(block) == [f"mlp.{name}"] or find_routers(block)[0] == f"mlp.{name}"
    assert not any(site.startswith(f"layer.mlp.{name}") for site in sites)
    others = ["attention.q_proj", "attention.gate", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]
    assert {f"layer.{other}" for other in [*others, "mlp.latent"]} <= sites
    assert sum("experts" in site for site in sites) == (_EXPERTS if experts is _Fused else 2 * _EXPERTS)
    routing = routing_parameters(block)
    assert routing == {id(parameter) for parameter in router.parameters()}


def test_a_router_may_lie_inside_the_module_of_the_experts() -> None:
    experts = _Fused()
    experts.score = nn.Linear(_WIDTH, _EXPERTS)
    block = nn.ModuleDict({"attention": experts, "kv_proj": nn.Linear(_WIDTH, 12)})
    assert find_routers(block) == ["attention.score"]
    assert "kv_proj" in {site.name.removeprefix("layer.") for site in find_sites("layer", block)}


def test_parameters_of_the_mixture_itself_belong_to_its_router() -> None:
    mixture = nn.ModuleDict({"gate": nn.Linear(_WIDTH, _EXPERTS, bias=False), "experts": _Fused()})
    mixture.register_parameter("expert_bias", nn.Parameter(torch.zeros(_EXPERTS)))
    mixture.register_parameter("bias", nn.Parameter(torch.zeros(_WIDTH)))
    block = nn.ModuleDict({"mlp": mixture})
    names = {name for name, parameter in block.named_parameters() if id(parameter) in routing_parameters(block)}
    assert names == {"mlp.gate.weight", "mlp.expert_bias"}


def test_a_gate_without_experts_beside_it_is_an_ordinary_layer() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(_WIDTH, 5), "gate_proj": nn.Linear(_WIDTH, 5), "up": nn.Linear(_WIDTH, 1)})
    assert find_routers(block) == [] and len(find_sites("layer", block)) == 3


def test_a_module_around_experts_is_no_router() -> None:
    block = nn.ModuleDict({"router_moe": nn.ModuleDict({"router": nn.Linear(_WIDTH, 5), "experts": _Fused()})})
    assert find_routers(block) == ["router_moe.router"]
    assert len(find_sites("layer", block)) == _EXPERTS
