"""Selection of experts: prices, brute force on small mixtures, groups and ties."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.solvers.expert_selection import (
    ExpertProblem,
    candidate_sets,
    check_count,
    joint_selection,
    keep_highest,
    msan_scores,
    reap_scores,
    replay_loss,
    replayed_output,
)


def _problem(seed: int, experts: int = 6, tokens: int = 48, *, k: int = 2, groups: int = 1) -> ExpertProblem:
    """Random experts of different size, some of them alike, behind a softmax router that renormalises."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, tokens, 5, generator=generator)
    mix = torch.randn(experts, 3, generator=generator)
    outputs = torch.einsum("eb,btd->etd", mix, basis) + 0.3 * torch.randn(experts, tokens, 5, generator=generator)
    logits = torch.randn(tokens, experts, generator=generator)

    def route(kept: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.full((len(rows), experts), float("-inf"))
        masked[:, list(kept)] = logits[rows][:, list(kept)]
        if groups > 1:  # the group of highest sum of its two best experts
            by_group = masked.view(len(rows), groups, -1)
            best = by_group.topk(2, dim=2).values.sum(dim=2).argmax(dim=1)
            outside = torch.ones(len(rows), groups, dtype=torch.bool).scatter_(1, best[:, None], False)
            masked = by_group.masked_fill(outside[..., None], float("-inf")).flatten(1)
        values, indices = masked.topk(k, dim=1)
        return indices, values.softmax(dim=1)

    weights = 0.5 + torch.rand(tokens, generator=generator)
    problem = ExpertProblem(outputs, torch.zeros(tokens, 5), weights, route, groups)
    target = replayed_output(problem, problem.experts) + 0.1 * torch.randn(tokens, 5, generator=generator)
    return ExpertProblem(outputs, target, weights, route, groups)


def _naive_loss(problem: ExpertProblem, kept: Sequence[int]) -> float:
    """The loss, token by token in float64."""
    total = 0.0
    for token in range(problem.outputs.shape[1]):
        routed, weights = problem.route(kept, torch.tensor([token]))
        terms = [float(g) * problem.outputs[int(i), token].double() for i, g in zip(routed[0], weights[0], strict=True)]
        difference = torch.stack(terms).sum(dim=0) - problem.target[token].double()
        total += float(problem.token_weights[token]) * float(difference.square().sum())
    return total


def test_the_loss_is_the_one_computed_token_by_token() -> None:
    problem = _problem(0)
    for kept in combinations(range(6), 4):
        assert replay_loss(problem, kept) == pytest.approx(_naive_loss(problem, kept), rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_joint_selection_is_close_to_the_best_of_all_sets(groups: int) -> None:
    ratios = []
    for seed in range(8):
        problem = _problem(seed, experts=8, groups=groups)
        size = 8 // groups
        losses: dict[tuple[int, ...], float] = {
            kept: replay_loss(problem, kept)
            for kept in combinations(range(8), 4)
            if all(sum(i // size == group for i in kept) == 4 // groups for group in range(groups))
        }
        sets = candidate_sets(problem, 4)
        kept, by_score = tuple(sets["joint"]), keep_highest(reap_scores(problem), 4, groups)
        assert kept in losses  # ascending, and equally many of each group
        ratios.append(losses[kept] / min(losses.values()))
        assert sets["REAP"] == by_score and losses[kept] <= losses[tuple(by_score)]
        assert sets["MSAN"] == keep_highest(msan_scores(problem), 4, groups)
    assert tuple(joint_selection(problem, 4)) == kept
    assert min(ratios) > 1 - 1e-6
    # A router that chooses groups first jumps from one group to another, which leaves more local optima.
    assert sum(ratios) / len(ratios) < (1.03 if groups == 1 else 1.08)


def test_scores_are_means_over_the_routed_tokens() -> None:
    problem = _problem(3, experts=5)
    routed, weights = problem.route(range(5), torch.arange(48))
    for expert in range(5):
        norms, gated = [], []
        for token, place in (routed == expert).nonzero().tolist():
            norms.append(float(problem.outputs[expert, token].norm()))
            gated.append(float(weights[token, place]) * norms[-1])
        assert float(msan_scores(problem)[expert]) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert float(reap_scores(problem)[expert]) == pytest.approx(sum(gated) / len(gated), rel=1e-5)


def test_an_expert_without_tokens_scores_zero_and_is_free_to_remove() -> None:
    problem = _problem(4)

    def route(kept: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
        assert len(rows)
        return problem.route([i for i in kept if i != 2], rows)

    unused = ExpertProblem(problem.outputs, problem.target, problem.token_weights, route)
    assert float(reap_scores(unused)[2]) == float(msan_scores(unused)[2]) == 0
    assert joint_selection(unused, 5) == [0, 1, 3, 4, 5]
    assert replay_loss(unused, [0, 1, 3, 4, 5]) == replay_loss(unused, range(6))


def test_highest_scores_are_kept_group_by_group_and_the_first_of_equals() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 1.0, 2.0, 2.0])
    assert keep_highest(scores, 4) == [0, 1, 2, 4]
    assert keep_highest(scores, 4, groups=2) == [0, 1, 4, 5]
    assert keep_highest(torch.ones(6), 2, groups=2) == [0, 3]


@pytest.mark.parametrize(
    ("count", "groups", "message"),
    [(1, 1, "at least 2"), (9, 1, "at most 8"), (5, 2, "multiple of 2"), (4, 4, "keep more")],
)
def test_a_count_that_changes_the_routing_is_refused(count: int, groups: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_count(8, count, top_k=2, groups=groups)
    check_count(8, 4, top_k=2, groups=2)
