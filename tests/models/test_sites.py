"""Sites read and write (out, in) matrices, whatever layout the module keeps them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from alps.models.routers import routing_parameters
from alps.models.sites import Site, find_sites

_OUT, _IN = 6, 4


def _site(layout: str, dtype: torch.dtype = torch.float32) -> Site:
    generator = torch.Generator().manual_seed(11)
    module = nn.Linear(_IN, _OUT) if layout == "linear" else Conv1D(_OUT, _IN)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Site("block.map", module.to(dtype))


def _inputs() -> Tensor:
    return torch.randn(5, _IN, generator=torch.Generator().manual_seed(12))


layouts = pytest.mark.parametrize("layout", ["linear", "conv1d"])


@layouts
def test_what_is_read_is_what_the_forward_multiplies_with(layout: str) -> None:
    site, x = _site(layout), _inputs()
    assert site.shape == (_OUT, _IN) == tuple(site.read().shape)
    module: Any = site.module
    torch.testing.assert_close(F.linear(x, site.read(), module.bias), module(x), rtol=0, atol=1e-6)


@layouts
def test_what_is_written_is_what_the_forward_multiplies_with(layout: str) -> None:
    site, x = _site(layout), _inputs()
    module: Any = site.module
    bias, parameter = module.bias.detach().clone(), site.parameter
    weight = torch.arange(_OUT * _IN, dtype=torch.float32).view(_OUT, _IN)
    stored = site.write(weight)
    assert torch.equal(stored, weight) and torch.equal(site.read(), weight)
    torch.testing.assert_close(module(x), x @ weight.T + bias, rtol=0, atol=1e-5)
    assert module.weight is parameter and torch.equal(module.bias, bias)


@layouts
def test_reading_is_a_view_without_a_gradient(layout: str) -> None:
    site = _site(layout)
    assert not site.read().requires_grad
    assert site.read().data_ptr() == site.parameter.data_ptr()


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_written_as_positive_zero(layout: str, dtype: torch.dtype) -> None:
    site = _site(layout, dtype)
    weight = torch.full((_OUT, _IN), 0.5)
    weight[0, :] = -0.0
    weight[1, 0] = 0.0
    weight[2, 1] = -1e-45  # underflows to -0.0 in every dtype but float32
    stored = site.write(weight)
    assert stored.dtype == dtype == site.dtype
    bits = site.read().contiguous().view(torch.int32 if dtype is torch.float32 else torch.int16)
    expected = _IN + 1 + (dtype is not torch.float32)
    assert int((site.read() == 0).sum()) == expected
    assert int((bits == 0).sum()) == expected
    assert torch.equal(stored, site.read())


def test_the_cast_rounds_to_nearest_once() -> None:
    site = _site("linear", torch.bfloat16)
    weight = torch.full((_OUT, _IN), 1.0 + 2**-8 + 2**-12)  # just above halfway between two bfloat16 numbers
    assert torch.equal(site.write(weight).float(), torch.full((_OUT, _IN), 1.0 + 2**-7))


def test_sites_come_in_the_order_of_registration_with_full_names() -> None:
    block = nn.ModuleDict(
        {
            "b": nn.Linear(2, 3),
            "norm": nn.LayerNorm(2),
            "a": nn.ModuleDict({"deep": Conv1D(5, 2)}),
            "embedding": nn.Embedding(3, 2),
        }
    )
    sites = find_sites("model.layers.7", block)
    assert [(site.name, site.kind, site.shape) for site in sites] == [
        ("model.layers.7.b", "b", (3, 2)),
        ("model.layers.7.a.deep", "deep", (5, 2)),
    ]
    assert [site.parameter_name for site in sites] == [
        "model.layers.7.b.weight",
        "model.layers.7.a.deep.weight",
    ]


def test_a_block_that_is_itself_a_linear_map_is_its_own_site() -> None:
    block = nn.Linear(2, 3)
    assert [(site.name, site.module) for site in find_sites("layers.0", block)] == [("layers.0", block)]


class _Experts(nn.Module):
    """Three maps from 4 features to 6 in one parameter, and parameters that are not fused in this way."""

    def __init__(self, turned: bool, attribute: str = "down_proj") -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.training_steps = 3, turned, 5
        generator = torch.Generator().manual_seed(13)
        shape = (3, _IN, _OUT) if turned else (3, _OUT, _IN)
        self.register_parameter(attribute, nn.Parameter(torch.randn(shape, generator=generator)))
        self.other = nn.Parameter(torch.zeros(5, 2, 2))
        self.bias = nn.Parameter(torch.zeros(3, _OUT))


@pytest.mark.parametrize("turned", [False, True])
def test_every_expert_is_a_site_of_its_own(turned: bool) -> None:
    block = nn.ModuleDict({"norm": nn.LayerNorm(2), "experts": _Experts(turned)})
    sites = find_sites("layers.7", block)
    assert [site.name for site in sites] == [f"layers.7.experts.down_proj.{i}" for i in range(3)]
    for expert, site in enumerate(sites):
        stored = block["experts"].get_parameter("down_proj")
        assert (site.kind, site.parameter_name) == ("experts.down_proj", "layers.7.experts.down_proj")
        assert (site.shape, site.entries, site.expert) == ((_OUT, _IN), 24, expert)
        others = stored.detach().clone()
        assert torch.equal(site.read(), stored[expert].T if turned else stored[expert])
        weight = torch.arange(24, dtype=torch.float32).view(_OUT, _IN)
        assert torch.equal(site.write(weight), weight) and torch.equal(site.read(), weight)
        assert torch.equal(stored[expert], weight.T if turned else weight)
        stored[expert].detach().copy_(others[expert])
        assert torch.equal(stored, others), "another expert was written to"


def test_a_module_of_experts_whose_parameter_is_called_weight_gives_its_own_name() -> None:
    (first, *_) = find_sites("layers.0", nn.ModuleDict({"input_linear": _Experts(False, "weight")}))
    assert first.name == "layers.0.input_linear.0" and first.kind == "0.input_linear"
    assert first.parameter_name == "layers.0.input_linear.weight"


def test_weights_and_biases_of_routers_are_known() -> None:
    experts = _Experts(False)
    block = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": experts}),
            "other": nn.ModuleDict({"router": nn.ModuleDict({"layer": nn.Linear(4, 3)}), "gate": nn.Linear(4, 4)}),
        }
    )
    routing = routing_parameters(block)
    names = {name for name, parameter in block.named_parameters() if id(parameter) in routing}
    assert names == {f"{name}.{part}" for name in ("mlp.gate", "other.router.layer") for part in ("weight", "bias")}
