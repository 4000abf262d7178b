"""Storage of activations, and the hint when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from alps.core.errors import SolveFailed
from alps.pruning.environment import RunEnvironment

_CPU = torch.device("cpu")


def test_activations_are_kept_within_the_limits(tmp_path: Path) -> None:
    tensor = torch.arange(8.0)
    kept = RunEnvironment(device=_CPU, activation_bytes=0, spill_folder=tmp_path).activation_store().store(tensor)
    assert torch.equal(kept, tensor) and kept.data_ptr() != tensor.data_ptr()
    elsewhere = RunEnvironment(device=torch.device("meta"))
    assert elsewhere.activation_store().store(tensor).device.type == "meta"
    assert replace(elsewhere, offload=True).activation_store().store(tensor).device == _CPU


@pytest.mark.parametrize(
    ("error", "fewer", "hint"),
    [
        (torch.OutOfMemoryError("full"), True, "--offload, give fewer --samples, or use --dtype bfloat16."),
        (MemoryError(), True, "--activation-memory, give fewer --samples, or use --dtype bfloat16."),
        (MemoryError(), False, "--activation-memory, or use --dtype bfloat16."),
    ],
)
def test_settings_that_need_less_memory_are_named(error: Exception, fewer: bool, hint: str) -> None:
    environment = RunEnvironment(device=_CPU)
    with pytest.raises(SolveFailed) as failed, environment.computation(nn.Linear(1, 1), fewer_samples=fewer):
        raise error
    assert str(failed.value).endswith(hint)


def test_float32_is_exact_in_a_computation() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with RunEnvironment(device=_CPU).computation(nn.Linear(1, 1)):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
