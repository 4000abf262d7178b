"""What a selection has to know of a vector of scores, wherever its parts are."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Scores(Protocol):
    """A float32 vector of scores without a NaN, of which this process may hold a part."""

    @property
    def values(self) -> Tensor:
        """What this process holds."""

    @property
    def entries(self) -> int:
        """Of the whole vector."""

    def sample(self, stride: int) -> Tensor:
        """Every `stride`-th entry of the whole vector."""

    def total(self, count: int) -> int:
        """The sum of what all processes have counted."""

    def top(self, kept: int) -> Tensor:
        """Mask of those of these values that are among the `kept` largest of the whole vector."""
