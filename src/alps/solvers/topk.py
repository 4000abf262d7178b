"""Exact selection of the k largest entries of a vector, of every row or of every group.

On a CPU a comparison is fast only if its result is a float, and a pass is fast only if its operands are still in the
cache. This is why the code compares in floats and works in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alps.core.errors import SolveFailed

# Up to this number float32 counts exactly.
_MAX_EXACT_COUNT = 2**24
# Entries handled at a time; a GPU is faster with many.
_CPU_CHUNK, _GPU_CHUNK = 2**18, _MAX_EXACT_COUNT
# Entries examined together when the few entries inside a bracket are collected.
_BRACKET_GROUP = 32
# Vectors shorter than this are selected from directly, without a sample.
_MIN_SAMPLED_SIZE = 2**16
# Strides of the sample are primes, so that it never runs along a column. The largest stride that gives the minimum
# sample size is used.
_STRIDES, _MIN_SAMPLE_SIZE = (4093, 1021, 251, 61), 2**11
# Cuts tried before the approximate search falls back to an exact selection, which costs about as much as ten cuts.
_MAX_CUTS = 12


class Scores(Protocol):
    """A float32 vector of scores without NaN, of which this rank may hold a shard."""

    @property
    def values(self) -> Tensor:
        """The scores on this rank."""

    @property
    def entries(self) -> int:
        """The length of the whole vector."""

    def sample(self, stride: int) -> Tensor:
        """Return every `stride`-th entry of the whole vector."""

    def total(self, count: int) -> int:
        """Return the sum of `count` over all ranks."""

    def top(self, kept: int) -> Tensor:
        """Return the mask of the values on this rank that are among the `kept` largest of the whole vector."""


@dataclass(frozen=True)
class LocalScores:
    """A vector of scores that this rank holds whole; implements `Scores`."""

    values: Tensor

    @property
    def entries(self) -> int:
        """The length of the vector."""
        return self.values.numel()

    def sample(self, stride: int) -> Tensor:
        """Return every `stride`-th entry."""
        return self.values[::stride].contiguous()

    def total(self, count: int) -> int:
        """Return `count`: no other rank adds to it."""
        return count

    def top(self, kept: int) -> Tensor:
        """Return the mask of the `kept` largest entries."""
        return topk_mask(self.values, kept)


class _Bracket(NamedTuple):
    """Interval of scores around the k-th largest, and the number of entries per unit of score in it."""

    low: float
    high: float
    density: float

    @property
    def has_density(self) -> bool:
        return 0 < self.density < float("inf")


def chunk_size(values: Tensor) -> int:
    """Return the number of entries of a tensor to handle at a time, which depends on its device."""
    return _CPU_CHUNK if values.device.type == "cpu" else _GPU_CHUNK


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with zeros where `mask` is False; negative values leave -0.0.

    On a CPU this product is about ten times faster than `torch.where` with a boolean mask.
    """
    return mask.view(torch.uint8).to(values.dtype).mul_(values)


def topk_mask(scores: Tensor, kept: int) -> Tensor:
    """Return the mask of exactly the `kept` largest entries of a vector; among equal entries the first are kept.

    Raises:
        SolveFailed: if scores are NaN, which happens for finite weights and inputs only if their products overflow.
    """
    size = scores.numel()
    if kept <= 0 or kept >= size:
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    cut = _kth_largest(scores, kept)
    if bool(cut.isnan()):
        raise SolveFailed("products of its weights and inputs overflow float32: check the model's weights")
    mask = torch.empty_like(scores, dtype=torch.bool)
    chunk = chunk_size(scores)
    for part, part_mask in zip(torch.split(scores, chunk), torch.split(mask, chunk), strict=True):
        part_mask.copy_(torch.ge(part, cut, out=torch.empty_like(part)))
    surplus = int(torch.count_nonzero(mask)) - kept
    if surplus:
        ties = (scores == cut).nonzero().squeeze(1)
        mask[ties[len(ties) - surplus :]] = False
    return mask


def topk_in_rows(scores: Tensor, kept: Tensor) -> Tensor:
    """Return the mask of the largest entries of every row; among equal entries the first are kept.

    Args:
        scores: shape (rows, columns).
        kept: number of entries to keep in each row, shape (rows,).
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, inside)


def redistribute(counts: Tensor, room: Tensor) -> Tensor:
    """Limit counts to the room there is, and spread the surplus in equal parts over the others.

    The sum stays the same as long as the total room allows it.

    Args:
        counts: preferred counts, int64.
        room: largest possible counts, int64.
    """
    total = min(int(counts.sum()), int(room.sum()))
    low, high = 0, int(room.max())
    while low < high:
        middle = (low + high) // 2
        if int(torch.minimum(counts + middle, room).sum()) < total:
            low = middle + 1
        else:
            high = middle
    raised = torch.minimum(counts + low, room)
    surplus = int(raised.sum()) - total
    if surplus:
        last = (raised > torch.minimum(counts + low - 1, room)).nonzero().squeeze(1)
        raised[last[len(last) - surplus :]] -= 1
    return raised


def topk_in_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """Return the mask of the `keep` largest of every `group` consecutive scores of a row.

    Among equal entries the first are kept. The group must divide the length of a row.
    """
    assert scores.shape[1] % group == 0
    groups = scores.reshape(-1, group)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    size = max(chunk_size(scores) // group, 1)
    for part, part_mask in zip(torch.split(groups, size), torch.split(mask, size), strict=True):
        # One contiguous row for each position in a group, so that every comparison runs over whole rows.
        part_mask.copy_(_ranks(part.T.contiguous()).lt_(keep).T)
    return mask.reshape(scores.shape)


def _ranks(scores: Tensor) -> Tensor:
    """Count, for each entry of `scores` (group, groups), the entries of its group that rank above it.

    Of two equal entries the left one ranks above the right one.
    """
    group = len(scores)
    # Before the comparisons, each position counts as beaten by every position to its right.
    rank = torch.arange(group - 1, -1, -1, device=scores.device, dtype=torch.float32)[:, None]
    rank = rank.repeat(1, scores.shape[1])
    loses = torch.empty_like(rank[0])
    for i in range(group):
        for j in range(i):
            torch.ge(scores[j], scores[i], out=loses)
            rank[i].add_(loses)
            rank[j].sub_(loses)
    return rank


def approx_topk_mask(scores: Scores, kept: int, slack: float, out: Tensor) -> Tensor:
    """Write ones at the largest scores and zeros elsewhere, by one cut that keeps approximately `kept` entries.

    Iterations whose result is not final use this. A sample gives the first cut. A secant search on the number of scores
    above the cut gives the next ones, each for one comparison and one sum.

    Args:
        scores: the whole vector, on one rank or on several.
        kept: number of entries to keep, 1 <= kept < entries.
        slack: largest error of the number of kept entries, as a fraction of `kept`.
        out: receives the mask of the values on this rank; has their shape and dtype.
    """
    if scores.entries >= _MIN_SAMPLED_SIZE:
        low, high, density = bracket = _sampled_bracket(scores, kept)
        cut, below, above = (low + high) / 2, -float("inf"), float("inf")
        last_cut, last_surplus = cut, 0
        for _ in range(_MAX_CUTS if bracket.has_density else 0):
            surplus = scores.total(_count(torch.ge(scores.values, cut, out=out))) - kept
            if abs(surplus) <= slack * kept:
                return out
            below, above = (cut, above) if surplus > 0 else (below, cut)
            if cut != last_cut and surplus != last_surplus:
                density = (last_surplus - surplus) / (cut - last_cut)
            last_cut, last_surplus = cut, surplus
            cut += surplus / density
            if not below < cut < above:
                cut = (below + above) / 2
    return out.copy_(scores.top(kept))


def _count(ones: Tensor) -> int:
    """Sum a vector of ones and zeros exactly."""
    return _exact_sum([part.sum() for part in torch.split(ones, _MAX_EXACT_COUNT)])


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest entry exactly, 1 <= k <= size.

    Large vectors are narrowed down first (Floyd and Rivest, Communications of the ACM 18(3), 1975). A sample estimates
    the entry, the count above the estimate corrects it, and only the entries near the corrected estimate are searched.
    A bracket that misses costs time, never correctness.
    """
    if scores.numel() >= _MIN_SAMPLED_SIZE:
        wide = _sampled_bracket(LocalScores(scores), k)
        for bracket in (_corrected_bracket(scores, k, wide), wide):
            above, inside = _split_by_bracket(scores, bracket)
            if above < k <= above + len(inside):
                return inside.kthvalue(len(inside) - (k - above) + 1).values
    return scores.kthvalue(scores.numel() - k + 1).values


def _sampled_bracket(scores: Scores, k: int) -> _Bracket:
    """Return a bracket of four standard deviations around the k-th largest entry of a sample."""
    stride = next((stride for stride in _STRIDES if scores.entries // stride >= _MIN_SAMPLE_SIZE), _STRIDES[-1])
    sample, share = scores.sample(stride), k / scores.entries
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 1
    bounds = (share * len(sample) + margin + 1, share * len(sample) - margin)
    ranks = [min(max(int(rank), 0), len(sample) - 1) for rank in bounds]
    low, high = (float(sample.kthvalue(len(sample) - rank).values) for rank in ranks)
    return _Bracket(low, high, (ranks[0] - ranks[1]) * stride / (high - low) if high > low else 0.0)


def _corrected_bracket(scores: Tensor, k: int, wide: _Bracket) -> _Bracket:
    """Return a much narrower bracket, from the count of entries above the middle of the sampled one."""
    low, high, density = wide
    if not wide.has_density:
        return wide
    middle = (low + high) / 2
    parts = torch.split(scores, chunk_size(scores))
    above = _exact_sum([torch.gt(part, middle, out=torch.empty_like(part)).sum(dtype=torch.float32) for part in parts])
    # A fifth of the step, in case the density differs from the sample's, and a term for uneven spacing.
    margin = (abs(above - k) / 5 + scores.numel() ** 0.5 / 10) / density
    middle += (above - k) / density
    return _Bracket(middle - margin, middle + margin, density)


def _split_by_bracket(scores: Tensor, bracket: _Bracket) -> tuple[int, Tensor]:
    """Return the number of entries above the bracket, and the entries inside it, bounds included."""
    above, inside = [], []
    for part in torch.split(scores, chunk_size(scores)):
        over = torch.gt(part, bracket.high, out=torch.empty_like(part))
        above.append(over.sum(dtype=torch.float32))
        within = torch.ge(part, bracket.low, out=torch.empty_like(part)).sub_(over)
        if len(part) % _BRACKET_GROUP == 0:
            # Few groups have an entry inside the bracket, and finding those groups is cheaper than testing every entry.
            groups = within.view(_BRACKET_GROUP, -1)
            hit = groups.amax(dim=0).nonzero().squeeze(1)
            within, part = groups[:, hit], part.view(_BRACKET_GROUP, -1)[:, hit]
        inside.append(part[within.bool()])
    return _exact_sum(above), torch.cat(inside)


def _exact_sum(counts: list[Tensor]) -> int:
    return int(torch.stack(counts).sum(dtype=torch.float64))
