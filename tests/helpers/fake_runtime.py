"""A runtime whose models take the time that a formula says, without a clock and without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from alps.pruning.latency import Generate


@dataclass(frozen=True)
class FakeRuntime:
    """Runtime in which a token takes a + blocks (b + c width + d heads) seconds.

    Attributes:
        fixed, per_block, per_channel, per_head: the coefficients.
        running: structures (blocks, width, heads) whose models are ready.
        calls: structures in the order in which they generated.
    """

    fixed: float = 1.0
    per_block: float = 0.1
    per_channel: float = 0.01
    per_head: float = 0.05
    running: list[tuple[int, int, int]] = field(default_factory=list)
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def seconds(self, blocks: int, width: int, heads: int) -> float:
        """Return the time of a token."""
        return self.fixed + blocks * (self.per_block + self.per_channel * width + self.per_head * heads)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Generate]:
        """Context in which a model on the meta device generates."""
        config: Any = model.config
        assert all(parameter.is_meta for parameter in model.parameters())
        numbers = (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)

        def generate(_tokens: int) -> float:
            self.calls.append(numbers)
            # A machine that gets slower with every call, by the same factor.
            return float(self.seconds(*numbers) * 1.001 ** len(self.calls))

        self.running.append(numbers)
        yield generate
        self.running.remove(numbers)
