"""Wall time by phase."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import pytest
import torch

from alps.core.phase_timer import PhaseTimer


@dataclass
class _Observation:
    seconds: float


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock be one second after the last one."""
    ticks = itertools.count(1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_phases_add_up() -> None:
    seconds: dict[str, float] = {}
    timer = PhaseTimer(torch.device("cpu"), seconds)
    for _ in range(2):
        with timer.measure("solve"):
            pass
    timer.add("solve", 0.5)
    timer.add("journal", 3.0)
    assert seconds == {"solve": 2.5, "journal": 3.0}


@pytest.mark.usefixtures("clock")
def test_observations_split_into_forward_and_gram() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    observations = [_Observation(0.25), _Observation(0.5)]
    assert list(timer.measure_observations(iter(observations))) == observations
    # Three looks for the next observation, a second each; the last finds none.
    assert timer.seconds == {"forward": 3.0 - 0.75, "gram": 0.75}
