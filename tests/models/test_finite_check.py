"""NaN and infinity found wherever they lie, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from alps.core.errors import CheckpointError
from alps.models.finite_check import check_finite, is_finite

_HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*_HALVES, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_is_found_at_every_place(bad: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 33, 130):
        for place in range(size):
            tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
            assert is_finite(tensor)
            tensor[place] = bad
            assert not is_finite(tensor), (size, place)


def test_extremes_empty_tensors_and_integers_are_finite() -> None:
    for dtype in _HALVES:
        ends = torch.finfo(dtype)
        assert is_finite(torch.tensor([[ends.max, ends.min, ends.tiny, 0.0]], dtype=dtype).T)
    assert is_finite(torch.empty(0, 3)) and is_finite(torch.tensor([2**62]))


def test_what_a_cast_would_make_infinite_is_told_apart() -> None:
    tensor = torch.tensor([1.0, 65519.0])  # the last one that float16 rounds down
    assert is_finite(tensor, torch.float16) and not is_finite(tensor + 1, torch.float16)
    with pytest.raises(CheckpointError, match="Tensor b of 'x' overflows float16: use --dtype bfloat16"):
        check_finite([("a", tensor), ("b", tensor + 1)], "x", torch.float16)
    with pytest.raises(CheckpointError, match="Tensor c of 'x' holds NaN"):
        check_finite([("a", tensor), ("c", tensor / 0 * 0)], "x", torch.float16)
