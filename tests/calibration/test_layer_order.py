"""The order in which layers are observed: all at once, or input by input on what was pruned before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.layer_order import calibrate
from alps.core.statistics import Needs
from alps.models.blocks import find_blocks
from helpers.decoders import decoder

_CPU = torch.device("cpu")


def _steps(model: Any, ids: Tensor, index: int, **options: Any) -> list[list[list[str]]]:
    """Kinds of the layers that share an input, by step."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    for block in blocks[:index]:
        inputs.advance(block.index, block.module, _CPU)
    steps = calibrate(blocks[index], inputs, Needs.GRAM, _CPU, **options)
    return [[[site.kind for site in source.sites] for source in step.shared] for step in steps]


def test_layers_are_observed_at_once_or_input_by_input(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    inputs = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert _steps(tiny_model("llama"), ids, 1) == [inputs]
    assert _steps(tiny_model("llama"), ids, 1, true_sequential=True) == [[source] for source in inputs]


def test_experts_of_one_parameter_are_one_step(ids: Tensor) -> None:
    steps = _steps(decoder("mixtral"), ids.repeat(8, 1), 0, true_sequential=True)
    assert [len(step) for step in steps] == [1, 1, 4, 4]
    kinds = [{kind for source in step for kind in source} for step in steps[2:]]
    assert kinds == [{"experts.gate_up_proj"}, {"experts.down_proj"}]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_later_inputs_are_those_of_what_was_pruned_before(
    tiny_model: Callable[..., Any], ids: Tensor, true_sequential: bool
) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    grams = {}
    for step in calibrate(blocks[0], inputs, Needs.GRAM, _CPU, true_sequential=true_sequential):
        for source in step.shared:
            grams[source.sites[0].kind] = source.stats.gram()
            for site in source.sites:
                site.write(site.read() * 0)
    # Values of zero make an output of zero, which the projection after them receives.
    assert bool(grams["o_proj"].any()) != true_sequential and bool(grams["q_proj"].any())


def test_layers_that_the_first_batch_does_not_reach_come_last_together(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    real = mlp.forward
    mlp.forward = lambda x: real(x) if len(x) < 3 else x
    steps = _steps(model, ids, 0, true_sequential=True)
    assert len(ids) % 3 != 0 and steps[:2] == [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]]]
    assert steps[2:] == [[["gate_proj", "up_proj"], ["down_proj"]]]


def test_a_method_without_inputs_gets_every_layer_by_itself(tiny_model: Callable[..., Any]) -> None:
    block = find_blocks(tiny_model("gpt2"))[0]
    (step,) = calibrate(block, BlockInputs([]), Needs.NOTHING, _CPU, true_sequential=True)
    assert [source.sites for source in step.shared] == [[site] for site in block.sites]
    assert step.unused == [] and step.seconds == 0.0
    assert list(calibrate(block.with_sites([]), BlockInputs([]), Needs.NOTHING, _CPU)) == []
