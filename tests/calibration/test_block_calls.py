"""Values for later blocks are held until their last use, and outputs take the layout of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_arguments import BlockArguments, Container, ContainerKey, HandedOn
from alps.calibration.block_calls import BlockCalls, BlockLayout, hidden_of

_KEY = ContainerKey(0, "shared")


class _Adds(nn.Module):
    """Block that adds what it is handed, fills a container, and returns a second output."""

    def forward(self, x: Tensor, handed: Any = None, shared: Any = None) -> Any:
        if shared is not None:
            shared[f"calls {len(shared)}"] = x.sum()
        return (x + 1 if handed is None else x + handed, 2 * x)


def _calls() -> BlockCalls:
    shared = Container(_KEY, {})
    single = [
        BlockArguments((), {"shared": shared}),
        BlockArguments((HandedOn(0, 1),), {}),
        BlockArguments((HandedOn(0, 1),), {"shared": shared}),
        BlockArguments((HandedOn(2, 0),), {}),
    ]
    return BlockCalls(BlockLayout((1, 1, 1, 1)), [[of_block] for of_block in single], single)


def test_values_are_held_until_the_last_block_that_reads_them() -> None:
    calls, block, hidden = _calls(), _Adds(), torch.ones(2, 3)
    outputs = [calls.run(0, block, hidden, {}, batch=0)]
    for index in (1, 2, 3):
        outputs.append(calls.run(index, block, outputs[-1].hidden, outputs[-1].handed_on, batch=0))
    assert [set(output.handed_on) for output in outputs] == [
        {HandedOn(0, 1), _KEY},
        {HandedOn(0, 1), _KEY},
        {HandedOn(2, 0)},
        set(),
    ]
    # x + 1 = 2, + 2 = 4, + 2 = 6, + 6 = 12
    assert [float(output.hidden[0, 0]) for output in outputs] == [2, 4, 6, 12]
    assert dict(outputs[0].handed_on[_KEY]) == {"calls 0": torch.tensor(6.0)}


def test_running_a_block_twice_leaves_no_trace() -> None:
    calls, block, hidden = _calls(), _Adds(), torch.ones(2, 3)
    first, second = (calls.run(0, block, hidden, {}, batch=0) for _ in range(2))
    assert first.handed_on[_KEY].keys() == second.handed_on[_KEY].keys() == {"calls 0"}


def test_windows_are_in_the_first_axis_outside_the_model() -> None:
    layout = BlockLayout((None, 2), window_axis=1)
    states = torch.rand(4, 2, 5)
    assert layout.from_model(states).shape == (2, 4, 5)
    assert torch.equal(layout.to_model(layout.from_model(states)), states)
    assert layout.wrap(0, states) is states
    assert layout.wrap(1, states) == (states, None, None)
    assert hidden_of((states, None)) is states and hidden_of(states) is states
