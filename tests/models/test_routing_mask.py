"""Tests of routing among some of the experts of a full block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alps.models.blocks import find_blocks
from alps.models.routing_mask import route_among
from alps.models.shrink_families import family_of
from helpers.decoders import decoder


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_tokens_are_sent_to_given_experts_only(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    block, family = find_blocks(model)[-1].module, family_of(model)
    assert family.experts is not None
    router = block.get_submodule(f"{family.experts.mixture}.{family.experts.router}")
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    chosen = list[Tensor]()
    handle = router.register_forward_hook(lambda _module, _args, output: chosen.append(output[2]))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with route_among(block, family, torch.tensor([0, 2])):
            masked = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    handle.remove()
    assert set(chosen[0].flatten().tolist()) == {0, 1, 2, 3} and set(chosen[1].flatten().tolist()) == {0, 2}
    assert torch.equal(plain, again) and not torch.equal(plain, masked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())


def test_weights_are_those_among_the_experts_that_stay() -> None:
    """Mixtral takes a softmax over all experts, and then that of the chosen ones."""
    model = decoder("mixtral")
    block: Any = find_blocks(model)[0].module
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), route_among(block, family_of(model), torch.tensor([1, 3])):
        _, weights, chosen = block.mlp.gate(hidden)
        expected = (hidden @ block.mlp.gate.weight[[1, 3]].T).softmax(-1)
    assert torch.allclose(weights, expected.sort(descending=True).values, atol=1e-6)
    assert torch.equal(chosen, torch.tensor([1, 3])[expected.sort(descending=True).indices])


def test_a_failure_of_the_router_leaves_no_mask_behind() -> None:
    model = decoder("mixtral")
    block: Any = find_blocks(model)[0].module
    with route_among(block, family_of(model), torch.tensor([1, 3])):
        with pytest.raises(RuntimeError):
            block.mlp.gate(torch.randn(5, 31))
        assert torch.nn.functional.linear(torch.ones(1, 32), torch.ones(4, 32)).tolist() == [[32.0] * 4]


def test_blocks_without_experts_are_unchanged(ids: Tensor) -> None:
    model = decoder("qwen2_moe")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with route_among(find_blocks(model)[0].module, family_of(model), torch.tensor([0, 1])):
            assert torch.equal(model(input_ids=ids).logits, plain)
