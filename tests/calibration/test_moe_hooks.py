"""Hooks on the products of experts: which side the inputs are on, and no trace left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.input_statistics import observe
from alps.calibration.moe_statistics import LayerInput
from alps.core.errors import UnsupportedModel
from alps.core.statistics import Needs
from alps.models.blocks import find_blocks
from helpers.decoders import MOE, decoder

_CPU = torch.device("cpu")


def _seen(model: nn.Module, ids: Tensor, batch_size: int = 7, needs: Needs = Needs.GRAM) -> Iterator[LayerInput]:
    """The inputs of all experts in the dense model."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    for block in blocks:
        yield from (
            source for source in observe(block, inputs, needs, _CPU).shared if source.sites[0].expert is not None
        )
        inputs.advance(block.index, block.module, _CPU)


@pytest.mark.parametrize("kind", MOE)
def test_observing_leaves_no_trace(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    report = alps.prune(model, sparsity=0.0, calibration=ids)
    assert report.zeros == 0
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


class _Experts(nn.Module):
    """Four maps in one parameter, from 8 features to 8, multiplied from the side that `inputs_first` says."""

    def __init__(self, inputs_first: bool) -> None:
        super().__init__()
        self.num_experts, self.inputs_first = 4, inputs_first
        self.weight = nn.Parameter(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [
            part @ self.weight[i] if self.inputs_first else F.linear(part, self.weight[i])
            for i, part in enumerate(hidden.chunk(4, dim=1))
        ]
        return torch.cat(parts, dim=1)


class _Model(nn.Module):
    def __init__(self, inputs_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([nn.Sequential(_Experts(inputs_first))])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.layers[0](self.embed(input_ids))
        return hidden


def test_experts_multiplied_from_the_other_side_are_refused(ids: Tensor) -> None:
    """Square slices: nothing but the product shows that rows are inputs."""
    plain = {source.sites[0].name: source.tokens for source in _seen(_Model(inputs_first=False), ids)}
    assert plain == {f"layers.0.0.{i}": ids.numel() // 4 for i in range(4)}
    model = _Model(inputs_first=True)
    with pytest.raises(UnsupportedModel, match=r"^layers\.0\.0\.weight of _Experts has another layout than expected"):
        list(_seen(model, ids))
    assert "forward" not in model.layers[0].__dict__
