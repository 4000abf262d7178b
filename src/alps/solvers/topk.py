"""The k largest entries of a vector, of every row or of every group, exactly.

On a CPU a comparison is fast only where its answer is a float, and a pass is fast only where its operands are still
in the cache: hence the float comparisons and the chunks below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.solvers.scores import Scores

# Entries handled at a time on a CPU; a GPU takes many at once. At most 2^24, up to which float32 counts exactly.
_COUNTABLE = 2**24
_CPU_CHUNK, _GPU_CHUNK = 2**18, _COUNTABLE
# Entries that are looked at together when a few of many are picked out.
_GROUP = 32
# Below this size a plain selection is fast enough.
_SAMPLED_FROM = 2**16
# Strides of the sample: primes, so that it never walks along a column; the largest that leaves enough entries.
_STRIDES, _SAMPLE = (4093, 1021, 251, 61), 2**11


def chunk_of(values: Tensor) -> int:
    """How many entries of a tensor to handle at a time."""
    return _CPU_CHUNK if values.device.type == "cpu" else _GPU_CHUNK


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask`, zero elsewhere; -0.0 where a negative value was.

    On a CPU `torch.where` on a boolean mask is some ten times slower than this product.
    """
    return mask.view(torch.uint8).to(values.dtype).mul_(values)


def topk_mask(scores: Tensor, kept: int) -> Tensor:
    """Mask of exactly the `kept` largest of a vector of scores; among equals the first ones win.

    Raises:
        SolveFailed: when scores are NaN, which finite weights and inputs only are where their products overflow.
    """
    size = scores.numel()
    if kept <= 0 or kept >= size:
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    cut = _kth_largest(scores, kept)
    if bool(cut.isnan()):
        raise SolveFailed("products of its weights and inputs overflow float32: check the model's weights")
    mask = torch.empty_like(scores, dtype=torch.bool)
    for part, answer in zip(torch.split(scores, chunk_of(scores)), torch.split(mask, chunk_of(scores)), strict=True):
        answer.copy_(torch.ge(part, cut, out=torch.empty_like(part)))
    surplus = int(torch.count_nonzero(mask)) - kept
    if surplus:
        ties = (scores == cut).nonzero().squeeze(1)
        mask[ties[len(ties) - surplus :]] = False
    return mask


def topk_in_rows(scores: Tensor, kept: Tensor) -> Tensor:
    """Mask of the largest entries of every row of scores (rows, columns), `kept` (rows,) of each; first ones win."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, inside)


def capped(counts: Tensor, room: Tensor) -> Tensor:
    """Counts that fit in: what one has too many goes to the others in equal parts, as far as they have room.

    Args:
        counts: how many are wanted, int64.
        room: how many there may be at most.
    """
    wanted = min(int(counts.sum()), int(room.sum()))
    low, high = 0, int(room.max())
    while low < high:
        middle = (low + high) // 2
        if int(torch.minimum(counts + middle, room).sum()) < wanted:
            low = middle + 1
        else:
            high = middle
    raised = torch.minimum(counts + low, room)
    surplus = int(raised.sum()) - wanted
    if surplus:
        last = (raised > torch.minimum(counts + low - 1, room)).nonzero().squeeze(1)
        raised[last[len(last) - surplus :]] -= 1
    return raised


def topk_in_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """Mask of the `keep` largest of every `group` consecutive scores of a row; among equals the first ones win."""
    assert scores.shape[1] % group == 0
    groups = scores.reshape(-1, group)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    size = max(chunk_of(scores) // group, 1)
    for part, answer in zip(torch.split(groups, size), torch.split(mask, size), strict=True):
        # One contiguous row for each place in a group, so that every comparison runs over whole rows.
        answer.copy_(_ranks(part.T.contiguous()).lt_(keep).T)
    return mask.reshape(scores.shape)


def _ranks(places: Tensor) -> Tensor:
    """How many other places of its group beat each entry of `places` (group, groups); equals lose to their left."""
    group = len(places)
    # Until it is compared, a place counts as beaten by every place to its right.
    rank = torch.arange(group - 1, -1, -1, device=places.device, dtype=torch.float32)[:, None]
    rank = rank.repeat(1, places.shape[1])
    loses = torch.empty_like(rank[0])
    for i in range(group):
        for j in range(i):
            torch.ge(places[j], places[i], out=loses)
            rank[i].add_(loses)
            rank[j].sub_(loses)
    return rank


# Counts after which the search for a cut gives up and selects exactly, which takes as long as some ten of them.
_COUNTS = 12


@dataclass(frozen=True)
class Whole:
    """A vector that this process holds alone."""

    values: Tensor

    @property
    def entries(self) -> int:
        return self.values.numel()

    def sample(self, stride: int) -> Tensor:
        return self.values[::stride].contiguous()

    def total(self, count: int) -> int:
        return count

    def top(self, kept: int) -> Tensor:
        return topk_mask(self.values, kept)


def approx_topk_mask(scores: Scores, kept: int, slack: float, out: Tensor) -> Tensor:
    """Ones at the largest scores, zeros elsewhere: `kept` of them to within the fraction `slack`, by one cut.

    What an iteration needs whose answer is not final. A sample gives the first cut, and a secant search on the number
    of scores above it the next ones, at one comparison and one sum each.

    Args:
        scores: all of them, wherever they are.
        kept: how many, 1 <= kept < entries.
        slack: by how much of `kept` the number may be off.
        out: where the answer for this process's values goes, like them.
    """
    if scores.entries >= _SAMPLED_FROM:
        low, high, density = _sampled(scores, kept)
        cut, below, above = (low + high) / 2, -float("inf"), float("inf")
        last_cut, last_surplus = cut, 0
        for _ in range(_COUNTS if 0 < density < float("inf") else 0):
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
    return _total([part.sum() for part in torch.split(ones, _COUNTABLE)])


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest entry, 1 <= k <= size, exactly.

    A large vector is narrowed down first (Floyd and Rivest, Communications of the ACM 18(3), 1975): a sample says
    about where the entry is, the count above that place says how far off, and only what lies around the corrected
    place is searched. A bracket that misses costs time, never correctness.
    """
    if scores.numel() >= _SAMPLED_FROM:
        low, high, density = _sampled(Whole(scores), k)
        for bracket in (_corrected(scores, k, low, high, density), (low, high)):
            above, inside = _bracketed(scores, *bracket)
            if above < k <= above + len(inside):
                return inside.kthvalue(len(inside) - (k - above) + 1).values
    return scores.kthvalue(scores.numel() - k + 1).values


def _sampled(scores: Scores, k: int) -> tuple[float, float, float]:
    """A bracket of four standard deviations around the k-th entry, and the entries per unit of score in it."""
    stride = next((stride for stride in _STRIDES if scores.entries // stride >= _SAMPLE), _STRIDES[-1])
    sample, share = scores.sample(stride), k / scores.entries
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 1
    wanted = (share * len(sample) + margin + 1, share * len(sample) - margin)
    ranks = [min(max(int(rank), 0), len(sample) - 1) for rank in wanted]
    low, high = (float(sample.kthvalue(len(sample) - rank).values) for rank in ranks)
    return low, high, (ranks[0] - ranks[1]) * stride / (high - low) if high > low else 0.0


def _corrected(scores: Tensor, k: int, low: float, high: float, density: float) -> tuple[float, float]:
    """A much narrower bracket, from the count of entries above the middle of the sampled one."""
    if not 0 < density < float("inf"):
        return low, high
    middle = (low + high) / 2
    parts = torch.split(scores, chunk_of(scores))
    above = _total([torch.gt(part, middle, out=torch.empty_like(part)).sum(dtype=torch.float32) for part in parts])
    # A fifth of the step, for a density that is not the sample's, and as much as uneven spacing may need.
    margin = (abs(above - k) / 5 + scores.numel() ** 0.5 / 10) / density
    middle += (above - k) / density
    return middle - margin, middle + margin


def _bracketed(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many entries are above `high`, and the entries from `low` to `high`."""
    above, inside = [], []
    for part in torch.split(scores, chunk_of(scores)):
        over = torch.gt(part, high, out=torch.empty_like(part))
        above.append(over.sum(dtype=torch.float32))
        within = torch.ge(part, low, out=torch.empty_like(part)).sub_(over)
        if len(part) % _GROUP == 0:
            # Few groups hold anything: finding those first is cheaper than looking at every entry.
            groups = within.view(_GROUP, -1)
            hit = groups.amax(dim=0).nonzero().squeeze(1)
            within, part = groups[:, hit], part.view(_GROUP, -1)[:, hit]
        inside.append(part[within.bool()])
    return _total(above), torch.cat(inside)


def _total(counts: list[Tensor]) -> int:
    return int(torch.stack(counts).sum(dtype=torch.float64))
