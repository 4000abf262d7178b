"""A replaced forward is used inside its context only, and one that was set before is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.replaced_forward import replaced_forward
from alps.models.blocks import find_blocks


def test_a_forward_is_replaced_inside_the_context_and_for_the_instance_alone() -> None:
    linear, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = linear(x)
    with pytest.raises(ValueError, match="inside"), replaced_forward(linear, lambda x: x + 1):
        assert torch.equal(linear(x), x + 1) and not torch.equal(other(x), x + 1)
        with replaced_forward(linear, lambda x: x + 2):
            assert torch.equal(linear(x), x + 2)
        assert torch.equal(linear(x), x + 1)
        raise ValueError("inside")
    assert torch.equal(linear(x), before) and "forward" not in linear.__dict__


def test_a_forward_that_someone_else_put_on_a_block_survives(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    # accelerate's dispatch of a model over devices replaces the forward of instances in just this way.
    model = tiny_model("llama")
    blocks = find_blocks(model)
    real = blocks[1].module.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * real(*args, **kwargs)

    blocks[1].module.forward = doubled
    capture_block_inputs(model, blocks, ids, 3)
    assert blocks[1].module.__dict__.get("forward") is doubled
