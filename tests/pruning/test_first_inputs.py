"""Inputs of the first block: batches of a reconstruction, windows of a rank, the loss on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import find_blocks
from alps.pruning.environment import RunEnvironment
from alps.pruning.first_inputs import DensePrefix, capture_first_inputs


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


@pytest.mark.parametrize(
    ("count", "tokens", "ranks", "limit", "batches", "share"),
    [
        (64, 128, 1, 4096, 8, 0.5),  # steps of four windows
        (64, 128, 8, 4096, 4, 0.5),  # of eight, one for each rank
        (64, 1024, 1, 4096, 4, 1 / 16),  # of one
        (64, 1024, 1, 512, 2, 1 / 32),  # two batches at least
        (8, 128, 1, 4096, 8, 1.0),  # fewer windows than the limit
        (64, 128, 1, None, None, 1.0),
    ],
)
def test_the_dense_model_sees_the_windows_of_the_reconstruction(
    count: int, tokens: int, ranks: int, limit: int | None, batches: int | None, share: float
) -> None:
    parameters = ReconstructionParameters(max_distinct_tokens=limit)
    assert DensePrefix.of(count, tokens, parameters, ranks) == DensePrefix(batches, share)


def test_without_reconstruction_the_dense_model_sees_all_windows() -> None:
    assert DensePrefix.of(1000, 1024, None, 1) == DensePrefix(None, 1.0)
