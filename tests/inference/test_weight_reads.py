"""Tests of the detection of layers whose weight other code reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alps.inference.weight_reads import find_read_layers
from helpers.decoders import decoder


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


# Rotary frequencies, masks and routing ask for values, which a model on the meta device does not have.
@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("jamba", {"mamba.dt_proj"}),
        ("rwkv", {"attention.output", "feed_forward.value"}),
        pytest.param("mamba", {"mixer.dt_proj"}, marks=pytest.mark.slow),
        pytest.param("mixtral", set(), marks=pytest.mark.slow),
        pytest.param("bloom", set(), marks=pytest.mark.slow),
        pytest.param("gemma4", set(), marks=pytest.mark.slow),
    ],
)
def test_layers_whose_weight_is_read_are_found(kind: str, read: set[str]) -> None:
    model = decoder(kind).to("meta")
    names = linear_layers(model)
    result = find_read_layers(model, names)
    assert result == {name for name in names if name.endswith(tuple(read))} and bool(result) == bool(read)


class _Model(nn.Module):
    """Model that reads the weight of one layer, asks only the dtype of another, and fails at will."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.read, self.asked, self.fails = nn.Linear(4, 4), nn.Linear(4, 4), fails

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = torch.zeros(*input_ids.shape, 4, device=input_ids.device, dtype=self.asked.weight.dtype)
        if bool((x == 0).all()) and self.fails:
            raise RuntimeError("no values")
        outputs: torch.Tensor = self.asked(x @ self.read.weight[: self.asked.in_features] + self.read.bias)
        return outputs * self.asked.weight.shape[0]


def test_shapes_and_dtypes_may_be_asked() -> None:
    assert find_read_layers(_Model(fails=False), ["read", "asked"]) == {"read"}
    assert find_read_layers(_Model(fails=False), ["asked"]) == set()


def test_a_model_that_needs_values_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "alps"):
        assert find_read_layers(_Model(fails=True), ["read", "asked"]) == set()
    assert "_Model does not run without values (no values)." in caplog.messages
