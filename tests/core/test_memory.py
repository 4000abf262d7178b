"""Peak memory, and errors when memory runs out."""

from __future__ import annotations

import pytest
import torch

from alps.core.errors import SolveFailed
from alps.core.memory import out_of_memory_as_error, peak_device_bytes, peak_host_bytes


def test_peaks_are_bytes() -> None:
    size = peak_host_bytes()
    block = bytearray(size + 64 * 2**20)  # more than the process ever held
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    grown = peak_host_bytes() - size
    assert grown > 48 * 2**20 and 100 * 2**20 < size < 2**40
    assert peak_device_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), "CUDA out of memory: lower --seqlen."),
        (MemoryError(), "The host is out of memory: use a larger machine."),
        (RuntimeError("can't allocate memory: 9 bytes"), "The host is out of memory: use a larger machine."),
    ],
)
def test_out_of_memory_becomes_one_sentence(error: Exception, message: str) -> None:
    with pytest.raises(SolveFailed) as caught, out_of_memory_as_error("lower --seqlen", "use a larger machine"):
        raise error
    assert str(caught.value) == message
    error.add_note("Site a.b")
    with pytest.raises(SolveFailed) as caught, out_of_memory_as_error("lower --seqlen", "use a larger machine"):
        raise error
    assert str(caught.value) == f"Site a.b: {message}"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), out_of_memory_as_error("lower --seqlen"):
        raise RuntimeError("shapes")
