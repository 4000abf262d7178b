"""The check accepts a right replay, and names the block and the argument of a wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.block_probe import probe_blocks
from alps.calibration.replay_check import check_replay
from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from helpers.decoders import decoder
from helpers.handing_models import MODELS, REFUSED, HandingModel

_CPU = torch.device("cpu")
_IDS = torch.randint(0, 64, (7, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_right_replay_is_accepted_and_unchanged(name: str, batch_size: int) -> None:
    model = HandingModel(name)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, _IDS, batch_size)
    before = [hidden.clone() for hidden in inputs.hidden]
    check_replay(model, blocks, inputs, _IDS, _CPU)
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, before, strict=True))
    assert all("forward" not in block.module.__dict__ for block in blocks)


@pytest.mark.parametrize("name", ["attribute", "computed", "writes"])
@pytest.mark.parametrize(("windows", "batch_size"), [(2, 1), (3, 1), (4, 2), (7, 2), (7, 3)])
def test_what_cannot_be_replayed_is_refused_with_block_and_argument(name: str, windows: int, batch_size: int) -> None:
    model = HandingModel(name)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, _IDS[:windows], batch_size)
    with pytest.raises(UnsupportedModel, match=f"HandingModel cannot be run one by one: {REFUSED[name]}"):
        check_replay(model, blocks, inputs, _IDS[:windows], _CPU)


def _with_arguments_of_the_last_batch(inputs: BlockInputs) -> BlockInputs:
    arguments = [[of_block[-1]] * len(of_block) for of_block in inputs.calls.arguments]
    return replace(inputs, calls=replace(inputs.calls, arguments=arguments))


@pytest.mark.parametrize(("name", "argument"), [("tokens", "extra"), ("flat", "extra"), ("nested", "extra")])
def test_arguments_of_another_batch_are_noticed(name: str, argument: str) -> None:
    model = HandingModel(name)
    blocks = find_blocks(model)
    inputs = _with_arguments_of_the_last_batch(capture_block_inputs(model, blocks, _IDS[:6], 2))
    with pytest.raises(UnsupportedModel, match=f"argument {argument} of block 0 differs when the block is replayed"):
        check_replay(model, blocks, inputs, _IDS[:6], _CPU)


def test_hidden_states_of_another_window_are_noticed() -> None:
    model = HandingModel("tokens")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, _IDS, 1)
    inputs.hidden.reverse()
    check_replay(model, blocks, inputs, _IDS, _CPU)  # the window in the middle is in its place
    inputs.hidden.append(inputs.hidden.pop(0))
    with pytest.raises(UnsupportedModel, match="the inputs of block 0 are not those of its own forward"):
        check_replay(model, blocks, inputs, _IDS, _CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mamba", "gemma4", "mixtral"])
def test_rounding_in_half_precision_is_accepted(kind: str, dtype: torch.dtype) -> None:
    # Mamba keeps its hidden states in float32 whatever the dtype of its weights.
    model = decoder(kind, dtype)
    blocks = probe_blocks(model, find_blocks(model))
    ids = torch.randint(2, 60, (12, 48), generator=torch.Generator().manual_seed(3))
    check_replay(model, blocks, capture_block_inputs(model, blocks, ids, 4), ids, _CPU)
