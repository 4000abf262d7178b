"""One run of `alps prune` with ALPS, as far as its cost depends on it, and what has to be known of a machine.

legend  n  inputs of a site, m its outputs            scalars
        K  inverses of n x n for one input            scalar
        R  iterations of the splitting for a site     scalar
        S  steps of its refit                         scalar
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from alps.solvers import hessian


@dataclass(frozen=True)
class Model:
    """A LLaMA's shapes; `inner` is the width of its feed-forward part."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    tied: bool = False

    @property
    def inputs(self) -> list[list[tuple[int, int]]]:
        """Shapes (m, n) of the sites of one block, by the input that they share, in the order of the forward."""
        d, narrow = self.hidden, self.hidden // self.heads * self.kv_heads
        return [[(d, d), (narrow, d), (narrow, d)], [(d, d)], [(self.inner, d)] * 2, [(d, self.inner)]]

    @property
    def weights(self) -> int:
        """Weights of all sites of one block."""
        return sum(m * n for sites in self.inputs for m, n in sites)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them, norms included."""
        return self.blocks * (self.weights + 2 * self.hidden) + self.outside


@dataclass(frozen=True)
class Counts:
    """Counts of the penalty schedule: R, K and S, the last by the shape (m, n) of the layer."""

    iterations: float = 33.0
    inverses: float = 11.0
    steps: float = 6.0
    by_shape: dict[tuple[int, int], float] = field(default_factory=dict)

    def steps_of(self, shape: tuple[int, int]) -> float:
        """S for sites of a shape."""
        return self.by_shape.get(shape, self.steps)


@dataclass(frozen=True)
class Changes:
    """Improvements that the program does not have yet.

    Attributes:
        aside: errors of a split site are summed over rows, too; blocks are written and read while others are solved.
    """

    aside: bool = False


@dataclass(frozen=True)
class Run:
    """One run: its windows, and the sizes in bytes that its memory and its messages depend on.

    Windows have `seqlen` tokens, weights `itemsize` bytes and inverses `inverse_itemsize`. At most `inverse_bytes` of
    inverses are kept, which is the program's limit on an H100 of 80 GiB.
    """

    model: Model
    windows: int
    seqlen: int
    size: int = 1
    counts: Counts = field(default_factory=Counts)
    itemsize: int = 2
    inverse_itemsize: int = 2
    inverse_bytes: float = 80 * 2**30 * hessian._CACHE_FRACTION
    changes: Changes = field(default_factory=Changes)

    def share(self, rank: int) -> int:
        """Windows of a process."""
        return len(range(rank, self.windows, self.size))

    def inverses(self, sites: Sequence[tuple[int, int]]) -> float:
        """Inverses that the sites of one input take: later sites find again as many as are kept."""
        kept = self.inverse_bytes // (sites[0][1] ** 2 * self.inverse_itemsize)
        return self.counts.inverses + (len(sites) - 1) * max(self.counts.inverses - kept, 0.0)


class Machine(Protocol):
    """Seconds that a piece of work takes in one process of a run, while all the others are at work."""

    def start(self) -> float:
        """From the command to the first block, and from the last one to its end, in every process."""

    def forward(self, windows: int, observing: bool) -> float:
        """One pass over a block; one that observes ends at the last site's input."""

    def gram(self, n: int, tokens: int) -> float:
        """Summing the statistics of one input."""

    def prepare(self, n: int) -> float:
        """Damping, scaling, and a look whether the matrix is definite."""

    def inverse(self, n: int) -> float:
        """One inverse."""

    def iteration(self, shape: tuple[int, int], part: float) -> float:
        """One iteration on a part of a site's rows, 1 for all."""

    def step(self, shape: tuple[int, int], part: float) -> float:
        """One step of the refit; two more are counted for what comes before it."""

    def trace(self, shape: tuple[int, int], part: float) -> float:
        """One error of the splitting, which three blocks of a run note at every check."""

    def errors(self, shape: tuple[int, int]) -> float:
        """The errors of a solved site, its own and magnitude's."""

    def reduce(self, nbytes: float, everywhere: bool) -> float:
        """A sum over all processes, at one of them or everywhere."""

    def send(self, nbytes: float) -> float:
        """A broadcast."""

    def select(self) -> float:
        """The messages by which all processes select the largest entries of a split site."""

    def fetch(self) -> float:
        """Reading the weights of a block."""

    def keep(self) -> float:
        """Writing a finished block down."""
