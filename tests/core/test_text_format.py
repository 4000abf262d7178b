"""Text for sizes, durations and dtypes."""

from __future__ import annotations

import pytest
import torch

from alps.core.text_format import dtype_name, format_duration, format_gib, format_peak_memory, format_size


def test_dtypes_have_no_module() -> None:
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float32)] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 MiB"), (2**30 - 2**20, "1023 MiB"), (2**30, "1.0 GiB"), (5 * 2**29, "2.5 GiB")]
)
def test_sizes_change_their_unit_at_a_gib(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_durations_change_their_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_peak_memory_names_the_device_when_it_was_used() -> None:
    assert format_gib(5 * 2**28, 3) == "1.250 GiB"
    assert format_peak_memory(5 * 2**28, 0, "cpu") == "1.25 GiB"
    assert format_peak_memory(2**30, 7 * 2**29, "cuda:0") == "1.00 GiB, 3.50 GiB on cuda:0"
