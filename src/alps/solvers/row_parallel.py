"""Selections and sums over a matrix whose rows are solved by several ranks at the same time.

Rows are independent in the W-step, in conjugate gradients and under N:M patterns. Three things depend on all rows: the
selection of the largest entries of the matrix, the number of entries by which the support still changes, and the end of
conjugate gradients. They are computed from sums over the ranks, so that all ranks decide as a single one would.

The exact selection: scores are not negative, so that their bits as integers have the same order. Two histograms, of the
upper and of the lower half of the bits, summed over the ranks, give the smallest score that is kept. Of equal scores
those of the first rows are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.solvers.patterns import Unstructured
from alps.solvers.topk import Scores

_HALF_BITS = 16
# Upper half of the bits of infinity; larger values are NaN.
_INFINITY = 0x7F80


@dataclass(frozen=True, eq=False)
class RowShard(Unstructured):
    """Sparsity of a matrix of which this rank holds some rows.

    Attributes:
        entries: of the whole matrix.
        entries_before: entries of the rows before those of this rank.
        group: ranks that hold the rows, the first rows on rank 0.
    """

    entries: int = 0
    entries_before: int = 0
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def of(cls, rows: Tensor, sparsity: float, entries: int, group: ProcessGroup) -> RowShard:
        """Return the pattern for the rows of this rank, shape (rows, in), of a matrix with `entries` weights."""
        return cls(sparsity, entries, _sum_before(rows.numel(), group, rows.device), group)

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask (rows, in) of this rank's entries among the largest of the whole matrix.

        Args:
            scores: of the rows of this rank, shape (rows, in), float32, none negative.
        """
        kept = self.entries - self.pruned_count(self.entries)
        return distributed_topk_mask(scores.reshape(-1), kept, self.group).reshape(scores.shape)

    def scores(self, values: Tensor) -> Scores:
        """Return a vector of this rank's scores as a part of all scores."""
        return _ScoreShard(values, self.entries, self.entries_before, self.group)


@dataclass(frozen=True)
class _ScoreShard:
    """Part of a vector of scores on this rank; see `alps.solvers.topk.Scores`."""

    values: Tensor
    entries: int
    entries_before: int
    group: ProcessGroup

    def sample(self, stride: int) -> Tensor:
        # Entries of other ranks are zero here, and are added in the sum.
        first = -(-self.entries_before // stride)
        local = self.values[first * stride - self.entries_before :: stride]
        sample = self.values.new_zeros(-(-self.entries // stride))
        sample[first : first + len(local)] = local
        return self.group.all_reduce_sum(sample)

    def total(self, count: int) -> int:
        return int(self.group.all_reduce_sum(torch.tensor(count, device=self.values.device)))

    def top(self, kept: int) -> Tensor:
        return distributed_topk_mask(self.values, kept, self.group)


def all_reduce_max_and_sum(
    maximum: float, summand: float, group: ProcessGroup, device: torch.device
) -> tuple[float, float]:
    """Return the largest of the first number, and the sum of the second, over all ranks."""
    if group.size == 1:
        return maximum, summand
    values = torch.zeros(2, group.size, dtype=torch.float64, device=device)
    values[:, group.rank] = torch.tensor([maximum, summand], dtype=torch.float64)
    values = group.all_reduce_sum(values)
    return float(values[0].max()), float(values[1].sum())


def distributed_topk_mask(scores: Tensor, kept: int, group: ProcessGroup) -> Tensor:
    """Return the mask of this rank's scores that are among the `kept` largest of all ranks.

    Args:
        scores: vector, float32, none negative; it may be empty.
        kept: entries to keep on all ranks.
        group: ranks that hold the scores, the first ones on rank 0.

    Raises:
        SolveFailed: when scores are NaN.
    """
    keys = scores.contiguous().view(torch.int32)
    upper = keys >> _HALF_BITS
    # Sums stay on the device of the scores: between GPUs they use the links between GPUs.
    histogram = group.all_reduce_sum(torch.bincount(upper, minlength=2**_HALF_BITS // 2))
    if int(histogram[_INFINITY + 1 :].sum()):
        raise SolveFailed("products of its weights and inputs overflow float32: check the model's weights")
    if kept <= 0 or kept >= int(histogram.sum()):
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    upper_bin, missing = _bin_of_kth_largest(histogram, kept)
    lower = keys[upper == upper_bin] & (2**_HALF_BITS - 1)
    histogram = group.all_reduce_sum(torch.bincount(lower, minlength=2**_HALF_BITS))
    lower_bin, missing = _bin_of_kth_largest(histogram, missing)
    threshold = (upper_bin << _HALF_BITS) | lower_bin
    mask = keys > threshold
    ties = (keys == threshold).nonzero().squeeze(1)
    mask[ties[: max(missing - _sum_before(len(ties), group, scores.device), 0)]] = True
    return mask


def _bin_of_kth_largest(histogram: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the k-th largest entry, and the number of entries of that bin to keep."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    return len(histogram) - 1 - position, k - (int(from_top[position - 1]) if position else 0)


def _sum_before(count: int, group: ProcessGroup, device: torch.device) -> int:
    """Return the sum of the counts of the ranks before this one."""
    counts = torch.zeros(group.size, dtype=torch.int64, device=device)
    counts[group.rank] = count
    return int(group.all_reduce_sum(counts)[: group.rank].sum())
