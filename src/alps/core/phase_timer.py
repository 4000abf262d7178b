"""Wall time of a run by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch


class _Timed(Protocol):
    seconds: float


_Observation = TypeVar("_Observation", bound=_Timed)


@dataclass
class PhaseTimer:
    """Sums of wall time by phase.

    Attributes:
        device: synchronised at the end of every phase.
        seconds: by phase. A caller may pass a mapping of its own, which is then updated in place.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Context whose wall time is added to a phase; nothing is added when it raises."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def measure_observations(self, observations: Iterator[_Observation]) -> Iterator[_Observation]:
        """Yield observations of block inputs, and split the time of each between `forward` and `gram`.

        Args:
            observations: each states in `seconds` the time that went into its Gram matrices.
        """
        while True:
            with self.measure("forward"):
                observation = next(observations, None)
            if observation is None:
                return
            self.add("forward", -observation.seconds)
            self.add("gram", observation.seconds)
            yield observation
