"""Tests of recorded tensors: what is computed from them equals what the operations give at once, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alps.models.recorded_tensor import RecordedTensor


def stored(name: str, values: Tensor, reads: list[str]) -> RecordedTensor:
    """Return a recorded tensor that notes each time it is read."""

    def read() -> Tensor:
        reads.append(name)
        return values.clone()

    return RecordedTensor.stored(name, list(values.shape), values.dtype, read)


def test_operations_are_computed_later_and_give_the_same() -> None:
    reads = list[str]()
    values = [torch.randn(6, 4) for _ in range(4)]
    tensors = [stored(f"expert.{i}", value, reads) for i, value in enumerate(values)]

    def fuse(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.stack(parts[:2]), torch.stack(parts[2:])], dim=1).transpose(1, 2).contiguous()

    fused = fuse(list(tensors)).to(torch.bfloat16)
    halves = tensors[0].chunk(2, dim=1)
    assert isinstance(fused, RecordedTensor) and reads == []
    assert fused.shape == (2, 4, 12) and fused.is_contiguous() and fused.dtype == torch.bfloat16
    assert fused.sources == [f"expert.{i}" for i in range(4)] and fused.source is None
    assert torch.equal(fused.compute(), fuse(values).to(torch.bfloat16))
    assert reads == [f"expert.{i}" for i in range(4)]
    assert isinstance(halves[1], RecordedTensor) and torch.equal(halves[1].compute(), values[0][:, 2:])
    assert "expert.0" in repr(fused)


def test_copies_know_their_source() -> None:
    tensor = stored("weight", torch.randn(3, 4), [])
    parameter = nn.Parameter(tensor[...].to(torch.float16), requires_grad=False)
    assert isinstance(parameter, RecordedTensor) and parameter.source == "weight" and parameter.dtype == torch.float16
    for computed in (tensor.t(), tensor + 1):
        assert isinstance(computed, RecordedTensor) and computed.source is None


def test_comparisons_are_computed_at_once() -> None:
    values, reads = torch.randn(3, 4), list[str]()
    one, other = stored("a", values, reads), stored("b", values, reads)
    assert torch.equal(one, other) and reads == ["a", "b"]
    assert not torch.equal(one, stored("c", values + 1, reads))


def test_changes_in_place_are_kept_and_are_no_copies_of_the_source() -> None:
    values = torch.randn(3, 4)
    parameter = nn.Parameter(stored("weight", values, []), requires_grad=False)
    parameter[-1] = 5.0
    assert isinstance(parameter, RecordedTensor) and parameter.source is None
    assert torch.equal(parameter.compute()[:2], values[:2]) and bool((parameter.compute()[2] == 5).all())


def test_new_tensors_and_ordinary_ones_that_are_changed_are_no_records() -> None:
    reads = list[str]()
    tensor = stored("weight", torch.full((3, 4), 7.0), reads)
    new = torch.empty_like(tensor).uniform_()
    assert type(new) is Tensor and new.shape == (3, 4) and reads == []
    assert bool((new.copy_(tensor) == 7).all()) and reads == ["weight"]


def test_parts_read_only_what_they_are_made_of() -> None:
    reads = list[str]()
    values = [torch.randn(3, 4) for _ in range(4)]
    tensors = [stored(str(i), value, reads) for i, value in enumerate(values)]
    fused = torch.cat([torch.stack(list(tensors[:2])), torch.stack(list(tensors[2:]))], dim=1).transpose(-1, -2)
    fused = fused.contiguous().to(torch.bfloat16)
    expected = torch.cat([values[1], values[3]]).t().to(torch.bfloat16)
    assert isinstance(fused, RecordedTensor) and isinstance(part := fused.part(1), RecordedTensor)
    assert torch.equal(part.compute(), expected) and reads == ["1", "3"]
    for other in (torch.cat(list(tensors)), torch.stack(list(tensors), dim=1), tensors[0], tensors[0].chunk(2)[0]):
        assert isinstance(other, RecordedTensor)
        part = other.part(1)
        computed = part.compute() if isinstance(part, RecordedTensor) else part
        assert torch.equal(computed, other.compute()[1])
