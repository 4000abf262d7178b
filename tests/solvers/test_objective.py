"""The relative reconstruction error from the Gram, against the outputs themselves."""

from __future__ import annotations

import pytest
import torch

from alps.core.statistics import InputStats
from alps.solvers.objective import relative_error, relative_errors
from helpers.problems import IN, OUT, PROBLEMS, normal


@pytest.mark.parametrize("problem", ["gaussian", "correlated", "dead_inputs", "one_output", "huge_token"])
def test_errors_are_those_of_the_outputs(problem: str) -> None:
    weight, inputs = PROBLEMS[problem]()
    other = normal(7, *weight.shape)
    outputs = inputs.double() @ weight.double().T
    expected = [
        float((inputs.double() @ pruned.double().T - outputs).square().sum() / outputs.square().sum())
        for pruned in (other, 0.5 * weight)
    ]
    assert expected[1] == pytest.approx(0.25)
    stats = InputStats.of(inputs)
    assert relative_errors([other, 0.5 * weight], weight, stats) == pytest.approx(expected, rel=1e-4)
    assert relative_error(other, weight, stats) == pytest.approx(expected[0], rel=1e-4)


def test_the_error_of_an_output_of_zero_is_zero() -> None:
    stats = InputStats.of(torch.zeros(5, IN))
    assert relative_errors([torch.ones(OUT, IN), torch.zeros(OUT, IN)], normal(1, OUT, IN), stats) == [0.0, 0.0]
