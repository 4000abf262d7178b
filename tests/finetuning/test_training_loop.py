"""The loop of a training: its schedule, its batches and its clock."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from alps.core.progress import NoProgress
from alps.finetuning.training_loop import Distillation, Schedule, _Clock, rate_share


def test_the_schedule_of_the_step_size() -> None:
    assert rate_share(0.0) == 0 and rate_share(0.05) == 1 and rate_share(0.025) == pytest.approx(0.5)
    assert rate_share(0.525) == pytest.approx(0.5) and rate_share(1.0) == pytest.approx(0, abs=1e-12)
    assert rate_share(1.2) == pytest.approx(0, abs=1e-12)


def _loop(windows: int, batch: int, held_back: int = 2, seed: int = 0) -> Distillation:
    ids = torch.arange(windows).repeat(3, 1).T
    schedule = Schedule(seconds=None, steps=4, batch=batch, held_back=held_back, seed=seed)
    unused: Any = None
    return Distillation(unused, unused, unused, ids, schedule, torch.device("cpu"), NoProgress())


def test_batches_hold_every_training_window_once_a_round_and_no_held_back_one() -> None:
    batches = list(itertools.islice(_loop(windows=8, batch=3)._batches(), 8))
    assert all(batch.shape == (3, 3) for batch in batches)
    rounds = [torch.cat(batches[i : i + 2])[:, 0].tolist() for i in range(0, 8, 2)]
    assert all(sorted(order) == list(range(6)) for order in rounds), "the last two are held back"
    assert len({tuple(order) for order in rounds}) > 1, "every round is shuffled"
    again = list(itertools.islice(_loop(windows=8, batch=3)._batches(), 8))
    other = list(itertools.islice(_loop(windows=8, batch=3, seed=1)._batches(), 8))
    assert torch.equal(torch.cat(batches), torch.cat(again)) and not torch.equal(torch.cat(batches), torch.cat(other))


def test_a_batch_is_never_larger_than_the_training_windows() -> None:
    (batch,) = itertools.islice(_loop(windows=5, batch=100)._batches(), 1)
    assert sorted(batch[:, 0].tolist()) == [0, 1, 2]


def test_the_clock_spends_steps_or_the_time_before_the_last_check(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _loop(windows=5, batch=1).clock
    clock.steps = 3
    assert clock.spent() == 0.75 and not clock.is_over
    clock.steps = 4
    assert clock.is_over
    now = [100.0]
    monkeypatch.setattr("alps.finetuning.training_loop.time.monotonic", lambda: now[0])
    timed = _Clock(Schedule(seconds=20.0, steps=None, batch=1, held_back=1, seed=0))
    timed.check_seconds, timed.step_seconds = 4.0, 3.0
    now[0] = 112.0
    assert timed.spent() == 0.75 and timed.spent(1.0) == 15 / 16 and not timed.is_over
    now[0] = 113.5
    assert timed.is_over
    timed.check_seconds = 20.0
    assert timed.spent() == math.inf
