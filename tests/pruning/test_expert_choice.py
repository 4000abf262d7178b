"""Choice among sets of experts by divergence and repetition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alps.calibration.masked_router import Mixture
from alps.pruning.expert_choice import choose_experts, kept_experts, repetition_rate
from helpers.mixtures import find_mixture_blocks, mixture_model, sliced_model

_CANDIDATES = {"first": [[0, 1, 2, 3, 4, 5]] * 4, "last": [[2, 3, 4, 5, 6, 7]] * 4, "all but one": [[*range(7)]] * 4}


def _mixtures(model: object) -> list[Mixture]:
    return [mixture for _, mixture in find_mixture_blocks(model)]


def test_divergences_are_those_of_the_sliced_models(ids: Tensor) -> None:
    model = mixture_model("qwen3_moe")
    choice = choose_experts(
        _mixtures(model),
        _CANDIDATES,
        [ids[:2], ids[2:]],
        logits=lambda batch: model(input_ids=batch, use_cache=False).logits,
        continuations=lambda: torch.zeros(1, 3, dtype=torch.int64),
    )
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
        for name, sets in _CANDIDATES.items():
            logits = sliced_model(model, sets[0])(input_ids=ids).logits.log_softmax(-1)
            kl = F.kl_div(logits, expected, reduction="none", log_target=True).sum(-1).mean()
            assert choice.measured[name].kl == pytest.approx(float(kl), rel=1e-4)
    assert choice.name == min(_CANDIDATES, key=lambda name: choice.measured[name].kl)


@pytest.mark.parametrize(("repeating", "chosen"), [("best", "second"), ("none", "best"), ("both", "best")])
def test_a_candidate_whose_text_repeats_itself_loses(repeating: str, chosen: str, ids: Tensor) -> None:
    model = mixture_model("mixtral")
    mixtures = _mixtures(model)
    candidates = {"best": [[*range(7)]] * len(mixtures), "second": [[0, 1]] * len(mixtures)}
    original = mixtures[0].routers[0].forward

    def continuations() -> Tensor:
        is_masked = mixtures[0].routers[0].forward != original
        is_second = is_masked and bool((model(input_ids=ids).logits - second).abs().max() < 1e-5)
        repeats = is_masked and (repeating == "both" or (repeating == "best" and not is_second))
        return torch.zeros(2, 20, dtype=torch.int64) if repeats else torch.arange(40).view(2, 20)

    with torch.no_grad(), kept_experts(mixtures, candidates["second"]):
        second = model(input_ids=ids).logits
    choice = choose_experts(
        mixtures,
        candidates,
        [ids],
        logits=lambda batch: model(input_ids=batch).logits,
        continuations=continuations,
    )
    assert choice.measured["best"].kl < choice.measured["second"].kl
    assert choice.dense_repetition == 0
    assert choice.name == chosen


def test_the_repetition_rate_counts_phrases_that_occurred_before() -> None:
    assert repetition_rate(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 5)
    assert repetition_rate(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 10)
    assert repetition_rate(torch.tensor([[1, 2]])) == 0
