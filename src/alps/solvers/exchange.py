"""Exchanges of kept for pruned entries after the splitting: a local search in which no step raises the error.

legend  W    dense weight                    (rows, in)
        H    Hessian with unit diagonal      (in, in)
        D    pruned weight, supported on M   (rows, in)
        M    support, True = kept            (rows, in)
        R    residual (W - D) H              (rows, in)
The search inside a row is `tableau.Tableau`. Rows do not interact: an unstructured budget is moved between two of them
where what one pays for giving an entry is less than what the other gains by taking one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.solvers.patterns import Pattern, SemiStructured
from alps.solvers.tableau import Offers, Tableau
from alps.solvers.topk import chunk_of

# Candidates of a row: the cheapest kept ones and the most promising pruned ones; under N:M whole groups.
_LEAVING, _ENTERING = 48, 32
# An exchange has to gain this share of its row's error: well above rounding, well below what matters.
_LEAST_SHARE = 1e-5
# How many times its price the gain of an entry moved between rows must be.
_MARGIN = 1.001
# Entries of L at a time, in chunks of `selection.chunk_of`, and what is small beside any process: by single rows a
# site of 576 inputs takes twice as long.
_CHUNKS, _SMALL = 4, 2**20


@dataclass
class Exchanged:
    """How a local search went: exchanges made, rounds run."""

    exchanges: int
    rounds: int


def exchange(H: Tensor, W: Tensor, D: Tensor, M: Tensor, worth: Tensor, pattern: Pattern, rounds: int) -> Exchanged:
    """Exchange entries until no candidate pair lowers the error, or the rounds are up.

    A round searches every row that may still gain, and then, for an unstructured budget, moves entries between rows.
    Rows are compared with what they were, in fresh products; one that did not gain is left alone.

    Args:
        H: Hessian, shape (in, in), unit diagonal.
        W: dense weight, shape (out, in).
        D: pruned weight, shape (out, in), zero off the support; overwritten with the answer.
        M: support, shape (out, in), boolean; overwritten, its count unchanged (N:M: in every group).
        worth: what a unit of squared residual of an input is worth once all else follows, diag((H + eps I)^{-1}),
            shape (in,). It only chooses the candidates.
        pattern: what the support obeys.
        rounds: at most so many.
    """
    rows, size = W.shape[0], W.new_zeros(W.shape[0])
    place = torch.zeros(rows, dtype=torch.long, device=W.device)
    offers = Offers(size + float("inf"), place, size - float("inf"), place.clone())
    live, done, ran = torch.arange(rows, device=W.device), 0, 0
    while ran < rounds and len(live):
        moved = _within(H, W, D, M, worth, pattern, live, offers)
        done, ran, live = done + int(moved.sum()), ran + 1, live[moved > 0]
        if not isinstance(pattern.base, SemiStructured):
            pairs, touched, extra = _across(H, W, D, M, worth, pattern, offers)
            done, live = done + pairs + extra, torch.unique(torch.cat([live, touched]))
    return Exchanged(done, ran)


def _within(
    H: Tensor, W: Tensor, D: Tensor, M: Tensor, worth: Tensor, pattern: Pattern, live: Tensor, offers: Offers
) -> Tensor:
    """Exchange inside each of the rows `live`, in place; how often, shape (live,)."""
    kept = M[live].sum(dim=1)
    # Rows of similar counts together: a batch is as wide as its fullest row.
    order = kept.argsort(descending=True, stable=True)
    moved = torch.zeros_like(kept)
    budget, start = max(min(_CHUNKS * chunk_of(W), W.numel() // 2), _SMALL), 0
    while start < len(order):
        width = int(kept[order[start]]) + _LEAVING + _ENTERING
        part = order[start : start + max(budget // width**2, 1)]
        moved[part] = _search_rows(H, W, D, M, worth, pattern, live[part], offers)
        start += len(part)
    return moved


def _search_rows(
    H: Tensor, W: Tensor, D: Tensor, M: Tensor, worth: Tensor, pattern: Pattern, part: Tensor, offers: Offers
) -> Tensor:
    w, d, m = W[part], D[part], M[part]
    free = pattern.part(part, slice(None)).free(m)
    delta = w - d
    R = delta @ H
    error = (R * delta).sum(dim=1)
    leaving, entering = _candidates(d, m, free, R, worth, pattern)
    row = Tableau(H, d, m, free, R, leaving, entering, pattern)
    count = row.search(_LEAST_SHARE * error)
    after, mask = row.answer(d, m)
    delta = w.sub_(after)
    better = row.sound & ((torch.mm(delta, H, out=R) * delta).sum(dim=1) < error)
    hit = part[better]
    D[hit], M[hit] = after[better], mask[better]
    row.offer(offers, part, row.sound & (better | (count == 0)))
    return torch.mul(count, better)


def _candidates(
    d: Tensor, m: Tensor, free: Tensor, R: Tensor, worth: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Places to leave and to enter, (rows, n) each; where a row has too few, places of the wrong kind follow."""
    cost = torch.where(m, d.square() / worth, float("inf"))
    profit = torch.where(free, R.square() * worth, -float("inf"))
    rows, size, base = *d.shape, pattern.base
    if not isinstance(base, SemiStructured):
        leaving = cost.topk(min(_LEAVING, size), dim=1, largest=False).indices
        return leaving, profit.topk(min(_ENTERING, size), dim=1).indices
    shape = (rows, -1, base.group)
    count = min(max((_LEAVING + _ENTERING) // base.group, 1), size // base.group)
    best = (profit.view(shape).amax(dim=2) - cost.view(shape).amin(dim=2)).topk(count, dim=1).indices
    chosen = best[:, :, None].expand(-1, -1, base.group)
    inside = m.view(shape).gather(1, chosen).to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    places = inside + best[:, :, None] * base.group
    return places[:, :, : base.keep].flatten(1), places[:, :, base.keep :].flatten(1)


def _across(
    H: Tensor, W: Tensor, D: Tensor, M: Tensor, worth: Tensor, pattern: Pattern, offers: Offers
) -> tuple[int, Tensor, int]:
    """Move entries between rows, one a row; pairs moved, rows touched, exchanges that followed inside them.

    When the touched rows together did not gain, half as many pairs are tried.
    """
    # Were half of the rows to give and half to take, those with the largest gain + price should take.
    scores = offers.gain + offers.price
    order = scores.argsort(stable=True)
    order = order[~scores[order].isnan()]
    half = len(order) // 2
    givers, takers = order[:half], order.flip(0)[:half]
    profit = offers.gain[takers] - _MARGIN * offers.price[givers]
    best = profit.argsort(descending=True, stable=True)
    givers, takers, pairs = givers[best], takers[best], int((profit > 0).sum())
    while pairs:
        give, take = givers[:pairs], takers[:pairs]
        touched = torch.cat([give, take])
        d, m, before = D[touched], M[touched], _error(H, W[touched] - D[touched])
        D[give, offers.give[give]], M[give, offers.give[give]] = 0.0, False
        M[take, offers.take[take]] = True
        moved = _within(H, W, D, M, worth, pattern, touched, offers)
        if _error(H, W[touched] - D[touched]) < before:
            return pairs, touched, int(moved.sum())
        D[touched], M[touched] = d, m
        offers.price[touched], offers.gain[touched] = float("inf"), -float("inf")
        pairs //= 2
    return 0, givers[:0], 0


def _error(H: Tensor, delta: Tensor) -> float:
    return float(((delta @ H) * delta).sum(dim=1).sum(dtype=torch.float64))
