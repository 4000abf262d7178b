"""Sizes of batches, and runs of single windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.models.blocks import find_blocks
from helpers.decoders import decoder


def test_batches_are_as_many_tokens_as_suit_the_device(tiny_model: Callable[..., Any]) -> None:
    dense, experts = find_blocks(tiny_model("llama")), find_blocks(decoder("qwen2_moe"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [batch_tokens(dense, cpu), batch_tokens(dense, gpu), batch_tokens(experts, cpu)] == [512, 4096, 4096]


def test_batches_may_differ_in_size_and_a_window_is_run_alone(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    blocks = find_blocks(model := tiny_model("llama"))
    sizes = [3, 1, len(ids) - 4]
    inputs = capture_block_inputs(model, blocks, ids, sizes)
    assert [len(hidden) for hidden in inputs.hidden] == sizes
    with torch.no_grad():
        whole = inputs.run(0, blocks[0].module, 0, torch.device("cpu"))
        alone = [inputs.run(0, blocks[0].module, 0, torch.device("cpu"), window=window) for window in range(3)]
    torch.testing.assert_close(torch.cat(alone), whole)
    assert not torch.equal(alone[0], alone[1])
