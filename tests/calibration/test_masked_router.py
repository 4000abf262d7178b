"""Routing among kept experts: the code of the model, compared with the smaller model itself."""

from __future__ import annotations

import pytest
import torch

from alps.calibration.masked_router import down_inputs, expert_output, find_mixture, masked_routing, route
from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from helpers.decoders import decoder
from helpers.mixtures import EXPERTS, GROUPED, KINDS, find_mixture_blocks, mixture_model, sliced_model

_CASES = [(kind, [0, 2, 3, 6, 7], False) for kind in KINDS]
_CASES += [(kind, [0, 1, 2, 3, 4, 5, 6, 7], True) for kind in GROUPED]


def _hidden(tokens: int = 40) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("kind", "kept", "grouped"), _CASES)
def test_masked_and_replayed_outputs_are_those_of_the_sliced_mixture(kind: str, kept: list[int], grouped: bool) -> None:
    kept = [2 * i + i % 2 for i in kept] if grouped else kept  # of sixteen experts two are kept in each group
    model = mixture_model(kind, 16 if grouped else EXPERTS, grouped=grouped)
    hidden = _hidden()
    small = find_mixture_blocks(sliced_model(model, kept))
    for (_, mixture), (_, sliced) in zip(find_mixture_blocks(model), small, strict=True):
        with torch.no_grad():
            expected = sliced.run(hidden)
            dense = mixture.run(hidden)
            with masked_routing(mixture, kept):
                masked = mixture.run(hidden)
            assert torch.equal(mixture.run(hidden), dense), "the mask is still there"
            index, weights = route(mixture, hidden, kept)
            own_index, own_weights = route(mixture, hidden, range(mixture.count))
            outputs = torch.stack([expert_output(mixture, hidden, i) for i in range(mixture.count)])
        scale = float(expected.norm())
        assert float((masked - expected).norm()) < 1e-5 * scale
        # Shared experts cancel in the difference from the dense mixture.
        rows = torch.arange(len(hidden))[:, None]
        replayed = (outputs[index, rows] * weights[..., None]).sum(dim=1)
        own = (outputs[own_index, rows] * own_weights[..., None]).sum(dim=1)
        assert float((dense + replayed - own - expected).norm()) < 1e-5 * scale
        assert float((dense - expected).norm()) > 1e-2 * scale  # the removal matters


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss", "llama4"])
def test_an_experts_output_is_its_last_map_of_its_inputs(kind: str) -> None:
    mixture = find_mixture_blocks(mixture_model(kind))[0][1]
    hidden = _hidden()
    for expert in (0, 5):
        site, x = down_inputs(mixture, hidden, expert)
        bias = mixture.experts.get_parameter("down_proj_bias")[expert] if kind == "gpt_oss" else 0
        with torch.no_grad():
            output = expert_output(mixture, hidden, expert)
            assert torch.allclose(x @ site.read().T + bias, output, atol=1e-6)


def test_experts_whose_routing_is_not_an_argument_are_refused() -> None:
    blocks = find_blocks(decoder("jetmoe"))
    with pytest.raises(UnsupportedModel, match="cannot be removed"):
        find_mixture(blocks[0])


def test_a_dense_block_has_no_mixture() -> None:
    assert find_mixture(find_blocks(decoder("llama"))[0]) is None
