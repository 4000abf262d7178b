"""Selection of the experts of a mixture to keep: by scores of single experts, or by replay of the model's routing.

legend  E, T, d  experts, tokens, features of the mixture's output             scalars
        F        output of every expert for every token                        (E, T, d)
        Y        output of the dense mixture, without shared experts           (T, d)
        w        token weights                                                 (T,)
        S        kept experts
        g        routing weights among the kept experts, by the model's code   (T, k)
        Y_S      sum over the k routed experts i of g_i f_i, f_i a row of F    (T, d)
The joint selection minimises loss(S) = sum_t w_t ||Y_S(t) - Y(t)||^2. It removes one expert at a time, the one that
raises the loss least, and then exchanges a removed expert for a kept one until no exchange lowers the loss. Removing j
changes the routing of a token only if j is among its k experts, so a candidate is replayed on those tokens alone.
Routers that choose groups first are replayed on all tokens, since j may decide on its group without being chosen.

REAP (arXiv 2510.13999) scores an expert by the mean of g ||f|| over the tokens routed to it, MSAN (arXiv 2606.15716) by
the mean of ||f|| over the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alps.core.errors import ConfigError

# Routing of tokens among kept experts: (kept, token numbers) to expert numbers (tokens, k) and weights (tokens, k).
Routing = Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]

# Tokens whose outputs are added up at once, which bounds the memory of a replay.
_CHUNK = 1024
# Passes over all removed experts in search of an exchange.
_MAX_PASSES = 10
# An exchange must lower the loss by more than rounding.
_MIN_GAIN = 1e-7


@dataclass(frozen=True)
class ExpertProblem:
    """Recorded outputs of a mixture's experts, and what they have to reproduce.

    Attributes:
        outputs: F, shape (E, T, d), any float dtype; sums are in float32.
        target: Y, shape (T, d), float32.
        token_weights: w, shape (T,), float32.
        route: routing among kept experts by the model's own code.
        groups: number of equal contiguous groups from which the router chooses first; each loses equally many experts.
    """

    outputs: Tensor
    target: Tensor
    token_weights: Tensor
    route: Routing
    groups: int = 1

    @property
    def experts(self) -> list[int]:
        """Numbers of all experts."""
        return list(range(len(self.outputs)))

    @property
    def group_size(self) -> int:
        """Number of experts in a group."""
        return len(self.outputs) // self.groups


def check_count(experts: int, count: int, *, top_k: int, groups: int = 1, chosen_groups: int = 1) -> None:
    """Check that `count` of a mixture's experts can be kept with its routing unchanged.

    Args:
        experts: of the mixture.
        count: experts to keep.
        top_k: experts of a token.
        groups: from which the router chooses first.
        chosen_groups: groups that a token may use.

    Raises:
        ConfigError: if experts cannot be removed equally from all groups, or too few are left for a token.
    """
    if not top_k <= count <= experts:
        raise ConfigError(
            f"{count} of {experts} experts cannot be kept: keep at least {top_k}, the experts of a token, and at most "
            f"{experts}."
        )
    if experts % groups or count % groups:
        raise ConfigError(
            f"{count} of {experts} experts cannot be kept: the router has {groups} groups, which have to lose equally "
            f"many; keep a multiple of {groups}."
        )
    per_group = count // groups
    if groups > 1 and (per_group < 2 or per_group * chosen_groups < top_k):
        raise ConfigError(
            f"{count} of {experts} experts leave {per_group} in each of {groups} groups: a token takes {top_k} experts "
            f"from {chosen_groups} groups with at least 2 each; keep more experts."
        )


def reap_scores(problem: ExpertProblem) -> Tensor:
    """Return REAP's score of every expert, shape (E,), float64; 0 for an expert without tokens."""
    return _mean_norms(problem, gated=True)


def msan_scores(problem: ExpertProblem) -> Tensor:
    """Return MSAN's score of every expert, shape (E,), float64; 0 for an expert without tokens."""
    return _mean_norms(problem, gated=False)


def keep_highest(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the numbers of the `count` experts of highest score, equally many from each group, in ascending order.

    Of equal scores the lower number is kept.
    """
    by_group = scores.reshape(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    offsets = torch.arange(groups, device=scores.device)[:, None] * by_group.shape[1]
    kept: list[int] = (order + offsets).flatten().sort().values.tolist()
    return kept


def replayed_output(problem: ExpertProblem, kept: Sequence[int]) -> Tensor:
    """Return Y_S of the kept experts for all tokens, shape (T, d), float32."""
    rows = _all_rows(problem)
    return _combine(problem.outputs, rows, *problem.route(kept, rows))


def replay_loss(problem: ExpertProblem, kept: Sequence[int]) -> float:
    """Return loss(S) of the kept experts."""
    return _State.start(problem, kept).loss


def candidate_sets(problem: ExpertProblem, count: int) -> dict[str, list[int]]:
    """Return the kept experts by the name of the selection: joint, REAP and MSAN."""
    scores = {"REAP": reap_scores(problem), "MSAN": msan_scores(problem)}
    by_score = {name: keep_highest(values, count, problem.groups) for name, values in scores.items()}
    return {"joint": _joint_selection(problem, count, list(by_score.values())), **by_score}


def joint_selection(problem: ExpertProblem, count: int) -> list[int]:
    """Select the experts to keep by exact replay.

    Exchanges begin at three sets: that of the elimination of one expert after the other, and those of highest score by
    REAP and MSAN. The result has the lowest loss of the three.

    Args:
        problem: recorded outputs; `check_count` holds for it.
        count: experts to keep.

    Returns:
        Numbers of the kept experts in ascending order. Equal problems give equal results.
    """
    return candidate_sets(problem, count)["joint"]


def _joint_selection(problem: ExpertProblem, count: int, others: Sequence[Sequence[int]]) -> list[int]:
    """Return the best of the sets that exchanges reach from an elimination, and from other sets."""
    starts = [_eliminate(problem, count)]
    for kept in map(tuple, others):
        if all(kept != state.kept for state in starts):
            starts.append(_State.start(problem, kept))
    return list(min(map(_exchange, starts), key=lambda state: state.loss).kept)


def _eliminate(problem: ExpertProblem, count: int) -> _State:
    """Remove the expert whose removal raises the loss least until `count` are left, equally many in each group."""
    state = _State.start(problem, problem.experts)
    while len(state.kept) > count:
        sizes = [sum(i // problem.group_size == group for i in state.kept) for group in range(problem.groups)]
        candidates = [i for i in state.kept if sizes[i // problem.group_size] > count // problem.groups]
        state = state.without(state.cheapest(candidates)[0])
    return state


def _exchange(state: _State) -> _State:
    """Exchange kept for removed experts of the same group, each for the cheapest, until no exchange gains."""
    problem = state.problem
    for _ in range(_MAX_PASSES):
        before = state.loss
        for added in (i for i in problem.experts if i not in state.kept):
            larger = state.with_expert(added)
            peers = [i for i in state.kept if i // problem.group_size == added // problem.group_size]
            removed, increase = larger.cheapest(peers)
            if larger.loss + increase < state.loss * (1 - _MIN_GAIN):
                state = larger.without(removed)
        if state.loss == before:
            break
    return state


@dataclass(frozen=True)
class _State:
    """Routing and error of every token among the kept experts.

    Attributes:
        problem: recorded outputs.
        kept: numbers of the kept experts, ascending.
        routed: expert numbers, shape (T, k).
        errors: w_t ||Y_S(t) - Y(t)||^2, shape (T,), float64.
    """

    problem: ExpertProblem
    kept: tuple[int, ...]
    routed: Tensor
    errors: Tensor

    @classmethod
    def start(cls, problem: ExpertProblem, kept: Sequence[int]) -> _State:
        kept, rows = tuple(sorted(kept)), _all_rows(problem)
        routed, errors = _replay(problem, kept, rows)
        return cls(problem, kept, routed, errors)

    @property
    def loss(self) -> float:
        return float(self.errors.sum())

    def cheapest(self, candidates: Sequence[int]) -> tuple[int, float]:
        """Return the candidate whose removal raises the loss least, the first of equals, and the increase.

        An expert without tokens is removed for nothing, before one whose removal would lower the loss.
        """
        increases = []
        for expert in candidates:
            rows = self._dependent_rows(expert)
            if not len(rows):
                return expert, 0.0
            _, errors = _replay(self.problem, self._without(expert), rows)
            increases.append(float((errors - self.errors[rows]).sum()))
        best = min(range(len(candidates)), key=increases.__getitem__)
        return candidates[best], increases[best]

    def without(self, expert: int) -> _State:
        return self._changed(self._without(expert), self._dependent_rows(expert))

    def with_expert(self, expert: int) -> _State:
        return self._changed(tuple(sorted((*self.kept, expert))), _all_rows(self.problem))

    def _without(self, expert: int) -> tuple[int, ...]:
        return tuple(i for i in self.kept if i != expert)

    def _dependent_rows(self, expert: int) -> Tensor:
        """Return the numbers of tokens whose routing the removal of a kept expert may change."""
        if self.problem.groups > 1:
            return _all_rows(self.problem)
        return (self.routed == expert).any(dim=1).nonzero().flatten()

    def _changed(self, kept: tuple[int, ...], rows: Tensor) -> _State:
        if not len(rows):
            return replace(self, kept=kept)
        routed, errors = _replay(self.problem, kept, rows)
        return replace(
            self,
            kept=kept,
            routed=self.routed.index_copy(0, rows, routed),
            errors=self.errors.index_copy(0, rows, errors),
        )


def _replay(problem: ExpertProblem, kept: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the routing (rows, k) of some tokens among kept experts, and their weighted errors (rows,) in float64."""
    routed, weights = problem.route(kept, rows)
    difference = _combine(problem.outputs, rows, routed, weights).sub_(problem.target[rows])
    return routed, difference.square_().sum(dim=1).mul_(problem.token_weights[rows]).double()


def _combine(outputs: Tensor, rows: Tensor, routed: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of g_i f_i over the routed experts of some tokens, shape (rows, d), float32."""
    combined = torch.zeros(len(rows), outputs.shape[2], device=outputs.device)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        for i in range(routed.shape[1]):
            weight = weights[part, i, None].float()
            # An expert that a router returns with weight 0 to fill up its k may be a removed one.
            combined[part] += torch.where(weight == 0, 0, weight * outputs[routed[part, i], rows[part]].float())
    return combined


def _mean_norms(problem: ExpertProblem, *, gated: bool) -> Tensor:
    """Return the mean of ||f||, times g if gated, over the tokens routed to each expert among all; shape (E,)."""
    routed, weights = problem.route(problem.experts, _all_rows(problem))
    scores = torch.zeros(len(problem.outputs), dtype=torch.float64, device=problem.outputs.device)
    for expert, outputs in enumerate(problem.outputs):
        tokens, places = (routed == expert).nonzero(as_tuple=True)
        if len(tokens):
            norms = outputs[tokens].float().norm(dim=1)
            scores[expert] = (norms * weights[tokens, places].float() if gated else norms).double().mean()
    return scores


def _all_rows(problem: ExpertProblem) -> Tensor:
    return torch.arange(problem.outputs.shape[1], device=problem.outputs.device)
