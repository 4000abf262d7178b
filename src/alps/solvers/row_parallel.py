"""A matrix whose rows are solved by several processes at the same time: what they have to agree on.

Rows are independent in the W-step, in conjugate gradients and under N:M. What ties them together is the selection of
the largest entries of the whole matrix, how much of the support still changes, and when conjugate gradients stop. All
of it is decided from sums over the processes, as one process would decide it. The exact selection: scores are not
negative, so that their bits as integers are in their order; two histograms, of the upper and of the lower half of the
bits, summed over the processes, say which score is the last one to stay. Among equal ones the first rows win.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.solvers.patterns import Pattern, Unstructured, keep_largest
from alps.solvers.topk import Scores

_HALF = 16
_INFINITE = 0x7F80  # the upper half of the bits of infinity; what is above it is no number


@dataclass(frozen=True, eq=False)
class RowShard(Unstructured):
    """A fraction of a matrix of which this process holds some rows.

    Attributes:
        entries: of the whole matrix.
        before: entries of the rows before these.
        group: ranks that hold the other rows.
    """

    entries: int = 0
    before: int = 0
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def of(cls, matrix: Tensor, sparsity: float, entries: int, group: ProcessGroup) -> RowShard:
        """These rows, shape (rows, in), of a matrix with so many `entries`."""
        return cls(sparsity, entries, _before(matrix.numel(), group, matrix.device), group)

    def select(self, scores: Tensor) -> Tensor:
        """Mask (out, in) of the entries that stay: with the other processes' rows exactly as many as the pattern keeps.

        Args:
            scores: of these rows, shape (out, in), float32, none negative.
        """
        kept = self.entries - self.pruned_count(self.entries)
        return distributed_topk_mask(scores.reshape(-1), kept, self.group).reshape(scores.shape)

    def scores(self, values: Tensor) -> Scores:
        """Those of these rows, a vector, as a part of all."""
        return _Shared(values, self.entries, self.before, self.group)


@dataclass(frozen=True)
class _Shared:
    """A part of a vector of scores; see `alps.solvers.topk.Scores`."""

    values: Tensor
    entries: int
    before: int
    group: ProcessGroup

    def sample(self, stride: int) -> Tensor:
        # Those of the others are zeros here, so that the sum has everybody's.
        first = -(-self.before // stride)
        mine = self.values[first * stride - self.before :: stride]
        sample = self.values.new_zeros(-(-self.entries // stride))
        sample[first : first + len(mine)] = mine
        return self.group.all_reduce_sum(sample)

    def total(self, count: int) -> int:
        return int(self.group.all_reduce_sum(torch.tensor(count, device=self.values.device)))

    def top(self, kept: int) -> Tensor:
        return distributed_topk_mask(self.values, kept, self.group)


def agreed(worst: float, gain: float, group: ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Return the maximum of the first and the sum of the second over all ranks."""
    if group.size == 1:
        return worst, gain
    values = torch.zeros(2, group.size, dtype=torch.float64, device=device)
    values[:, group.rank] = torch.tensor([worst, gain], dtype=torch.float64)
    values = group.all_reduce_sum(values)
    return float(values[0].max()), float(values[1].sum())


def select(scores: Tensor, pattern: Pattern) -> Tensor:
    """`pattern.keep_largest` on a whole matrix, or on these rows of one that is shared; scores are not negative."""
    return pattern.select(scores) if isinstance(pattern, RowShard) else keep_largest(scores, pattern)


def distributed_topk_mask(scores: Tensor, kept: int, group: ProcessGroup) -> Tensor:
    """Mask of those of this process's scores that are among the `kept` largest of all processes.

    Args:
        scores: a vector of float32, none negative; it may be empty.
        kept: entries that stay, of all processes.
        group: the ranks.

    Raises:
        SolveFailed: when scores are NaN.
    """
    keys = scores.contiguous().view(torch.int32)
    upper = keys >> _HALF
    # Sums stay where the scores are: between GPUs they go by the links between GPUs.
    histogram = group.all_reduce_sum(torch.bincount(upper, minlength=2**_HALF // 2))
    if int(histogram[_INFINITE + 1 :].sum()):
        raise SolveFailed("products of its weights and inputs overflow float32: check the model's weights")
    if kept <= 0 or kept >= int(histogram.sum()):
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    bin_, missing = _bin_of(histogram, kept)
    lower = keys[upper == bin_] & (2**_HALF - 1)
    last, missing = _bin_of(group.all_reduce_sum(torch.bincount(lower, minlength=2**_HALF)), missing)
    cut = (bin_ << _HALF) | last
    mask = keys > cut
    ties = (keys == cut).nonzero().squeeze(1)
    mask[ties[: max(missing - _before(len(ties), group, scores.device), 0)]] = True
    return mask


def _bin_of(histogram: Tensor, kept: int) -> tuple[int, int]:
    """The bin of the `kept`-th largest entry, and how many of that bin stay."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, kept))
    return len(histogram) - 1 - place, kept - (int(from_top[place - 1]) if place else 0)


def _before(count: int, group: ProcessGroup, device: torch.device) -> int:
    """The counts of the processes before this one."""
    counts = torch.zeros(group.size, dtype=torch.int64, device=device)
    counts[group.rank] = count
    return int(group.all_reduce_sum(counts)[: group.rank].sum())
