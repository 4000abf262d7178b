"""Times measured before a run: on random tokens, with the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.data.loaded_model import LoadedModel
from alps.pruning.dry_run import forecast
from alps.solvers.patterns import Unstructured
from helpers.runs import make_context, make_recipe

_HALF = Unstructured(0.5)


def test_random_tokens_are_of_the_vocabulary(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = torch.randint

    def note(*args: Any, **kwargs: Any) -> Tensor:
        drawn: Tensor = real(*args, **kwargs)
        seen.append(drawn)
        return drawn

    monkeypatch.setattr("alps.pruning.time_estimate.torch.randint", note)
    loaded = LoadedModel("tiny", tiny_model("llama"), None)
    forecast(loaded, make_recipe("wanda", _HALF), make_context(), samples=4, seqlen=16)
    # The first ids are those of the probe of the layers.
    assert seen[-1].shape == (1, 16) and int(seen[-1].max()) < 64
