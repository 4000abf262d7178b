"""Equal arguments are recorded once, and arguments that cannot be replayed are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration.argument_recorder import ArgumentRecorder, UnsupportedArgument
from alps.calibration.block_arguments import BlockArguments, Container, HandedOn

_TABLE, _MASK = torch.rand(1, 3), torch.rand(1, 4)


def _record(windows: int, references: list[Any], extra: Any, count: list[Tensor] | None = None) -> BlockArguments:
    def store(tensor: Tensor) -> Tensor:
        (count if count is not None else []).append(tensor)
        return tensor.clone()

    recorder = ArgumentRecorder(windows, [[reference] for reference in references], store)
    kwargs = {"tables": (_TABLE.clone(), [_MASK.expand(windows, 4), 3]), "flag": True, "extra": extra}
    return recorder.record(0, ["mask"], BlockArguments((_MASK.expand(windows, 4),), kwargs))


def test_equal_arguments_are_one_object_and_stored_once() -> None:
    stored: list[Tensor] = []
    single = _record(1, [], None, stored)
    assert len(stored) == 3
    first = _record(2, [single], None, stored)
    # Only the mask has another shape for two windows; the two views of it are two tensors.
    assert [tuple(tensor.shape) for tensor in stored[3:]] == [(2, 4), (2, 4)]
    assert first is not single and first.kwargs["tables"][0] is single.kwargs["tables"][0]
    assert _record(2, [single, first], None, stored) is first and len(stored) == 5
    assert _record(1, [single], None, stored) is single and len(stored) == 5


def test_a_tensor_of_its_own_is_stored_and_the_others_are_shared() -> None:
    single, stored = _record(1, [], torch.ones(1, 5)), list[Tensor]()
    first = _record(2, [single], torch.ones(2, 5))
    second = _record(2, [single, first], 2 * torch.ones(2, 5), stored)
    assert second is not first and len(stored) == 1 and torch.equal(second.kwargs["extra"], 2 * torch.ones(2, 5))
    assert second.args[0] is first.args[0] and second.kwargs["tables"][1] is first.kwargs["tables"][1]


def test_a_tensor_that_all_blocks_receive_is_stored_once() -> None:
    stored: list[Tensor] = []
    recorder = ArgumentRecorder(1, (), lambda tensor: stored.append(tensor) or tensor.clone())  # type: ignore[func-returns-value]
    recorded = [recorder.record(block, [], BlockArguments((), {"x": _TABLE})) for block in range(3)]
    assert len(stored) == 1 and recorded[0].kwargs["x"] is recorded[2].kwargs["x"]


def test_outputs_of_earlier_blocks_and_containers_are_recognised_by_identity() -> None:
    recorder, output, shared = ArgumentRecorder(1), torch.rand(2), dict[str, Tensor]()
    recorder.hand_on(4, [torch.rand(2), output])
    kwargs = {"states": output, "equal": output.clone(), "shared": shared}
    first = recorder.record(5, [], BlockArguments((), kwargs))
    assert first.kwargs["states"] == HandedOn(4, 1) and torch.equal(first.kwargs["equal"], output)
    second = recorder.record(6, [], BlockArguments((), {"again": shared, "other": {}}))
    assert isinstance(first.kwargs["shared"], Container) and second.kwargs["again"] is first.kwargs["shared"]
    assert second.kwargs["other"].key != first.kwargs["shared"].key


@pytest.mark.parametrize(
    ("single", "batch", "reason"),
    [
        (torch.rand(1, 5), torch.rand(3, 5), "several windows at once"),
        (torch.rand(1, 5), torch.rand(2, 6), "several windows at once"),
        (torch.rand(1, 5), torch.rand(2), "several windows at once"),
        (torch.tensor(1.0), torch.tensor(2.0), "several windows at once"),
        (torch.rand(1, 5), None, "a tensor for some windows only"),
        (None, torch.rand(2, 5), "a tensor for some windows only"),
        ([1], None, "a tensor for some windows only"),
        (None, {"a": 1}, "a list or a dict for some windows only"),
        ((1, 2), (1, 2, 3), "its items depend on the tokens"),
        ({"a": 1}, {"b": 1}, "its items depend on the tokens"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(single: Any, batch: Any, reason: str) -> None:
    with pytest.raises(UnsupportedArgument) as error:
        _record(2, [_record(1, [], single)], batch)
    assert error.value.name == "extra" and reason in error.value.reason


def test_a_number_that_depends_on_the_batch_is_kept_for_it() -> None:
    single = _record(1, [], 1)
    first = _record(2, [single], 2)
    assert first.kwargs["extra"] == 2 and _record(2, [single, first], 2) is first
