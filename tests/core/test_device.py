"""Devices, and exact float32 products on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alps.core.device import bfloat16_factors, exact_float32, pick_device
from alps.core.errors import ConfigError
from helpers.cli_process import run_code


@pytest.fixture
def precision() -> Iterator[None]:
    """Put back whatever precision the test leaves behind."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_exact_float32_holds_inside_and_gives_back_what_was(before: str) -> None:
    torch.set_float32_matmul_precision(before)
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.usefixtures("precision")
def test_bfloat16_factors_give_exact_products_of_bfloat16_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(300, 200, generator=generator).bfloat16().float() for _ in range(2))
    with exact_float32(), bfloat16_factors():
        product = left.T @ right
        assert torch.get_float32_matmul_precision() == "medium"
    exact = left.double().T @ right.double()
    assert float((product - exact).norm() / exact.norm()) < 3e-6


_NEW_SWITCH = """
import torch
from alps.core.device import bfloat16_factors, exact_float32
torch.backends.cuda.matmul.fp32_precision = "tf32"
with exact_float32():
    assert torch.backends.cuda.matmul.fp32_precision == "ieee", torch.backends.cuda.matmul.fp32_precision
    before = torch.backends.mkldnn.matmul.fp32_precision
    with bfloat16_factors():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", torch.backends.mkldnn.matmul.fp32_precision
    assert torch.backends.mkldnn.matmul.fp32_precision == before
assert torch.backends.cuda.matmul.fp32_precision == "tf32", torch.backends.cuda.matmul.fp32_precision
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has only the older switch"
)
def test_exact_float32_copes_with_callers_who_use_the_newer_switch() -> None:
    # In a process of its own: torch has no way back once the two kinds of switches were mixed.
    done = run_code(_NEW_SWITCH)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_a_device_is_picked_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cuda:x", "cpu:-1", "hpu", "meta"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    message = str(caught.value)
    assert message.startswith(f"Device '{name}' cannot be used here (")
    assert message.endswith("): choose auto, cpu or cuda:N.") and "\n" not in message
