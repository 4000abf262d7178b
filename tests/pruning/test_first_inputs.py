"""Inputs of the first block: batches of a reconstruction, windows of a rank, the loss on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import find_blocks
from alps.pruning.environment import RunEnvironment
from alps.pruning.first_inputs import capture_first_inputs


@pytest.mark.parametrize(("tokens", "sizes"), [(None, [5]), (32, [2, 2, 1])])
def test_batches_are_steps_of_a_reconstruction(
    tiny_model: Callable[..., Any], tokens: int | None, sizes: list[int]
) -> None:
    model, ids = tiny_model("llama"), torch.arange(80).view(5, 16) % 60
    reconstruction = None if tokens is None else ReconstructionParameters(tokens=tokens)
    environment = RunEnvironment(device=torch.device("cpu"))
    inputs, loss = capture_first_inputs(model, find_blocks(model), ids, environment, reconstruction)
    assert [len(hidden) for hidden in inputs.hidden] == sizes
    assert torch.equal(torch.cat(inputs.hidden), model.model.embed_tokens(ids))
    assert torch.equal(torch.cat(list(loss.ids)), ids)
