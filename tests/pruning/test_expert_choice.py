"""Choice among sets of experts by divergence and repetition, block by block."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alps.calibration.activation_store import ActivationStore
from alps.calibration.expert_records import SELECTION_TOKENS, expert_problem, record_tokens
from alps.core.distributed import SINGLE_PROCESS
from alps.models.blocks import find_blocks
from alps.pruning import expert_choice
from alps.pruning.expert_choice import (
    CandidateQuality,
    ExpertChooser,
    ExpertSets,
    choose_candidate,
    repetition_rate,
)
from alps.solvers.expert_selection import candidate_sets
from helpers.mixtures import find_mixture_blocks, inputs_of, mixture_model, sliced_model

_CPU = torch.device("cpu")


def _chooser(model: Any) -> ExpertChooser:
    return ExpertChooser(model=model, blocks=find_blocks(model), device=_CPU, activations=ActivationStore())


def _result(steps: Callable[[], Generator[None, None, Any]]) -> tuple[Any, int]:
    """Return what a generator returns, and the number of its steps."""
    count = [0]

    def on_step() -> None:
        count[0] += 1

    return SINGLE_PROCESS.run_on_main(steps, on_step), count[0]


def _candidates(model: Any) -> dict[str, ExpertSets]:
    sets = {"first": [0, 1, 2, 3, 4, 5], "last": [2, 3, 4, 5, 6, 7], "all but one": [*range(7)]}
    return {name: {block.index: kept for block, _ in find_mixture_blocks(model)} for name, kept in sets.items()}


def test_divergences_are_those_of_the_sliced_models(ids: Tensor) -> None:
    model = mixture_model("qwen2_moe")
    candidates = _candidates(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured, steps = _result(lambda: _chooser(model).divergences(candidates, ids))
    assert steps == 4
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
        for divergence, sets in zip(measured, candidates.values(), strict=True):
            logits = sliced_model(model, next(iter(sets.values())))(input_ids=ids).logits.log_softmax(-1)
            kl = F.kl_div(logits, expected, reduction="none", log_target=True).sum(-1).mean()
            assert divergence == pytest.approx(float(kl), rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_continuations_are_the_greedy_ones_of_the_sliced_models(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_choice, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(expert_choice, "PROMPTS", 2)
    model = mixture_model("mixtral")
    candidates = {"first": _candidates(model)["first"]}
    continued, _ = _result(lambda: _chooser(model).continuations([{}, *candidates.values()], ids))
    kept = [[*range(8)], *(next(iter(sets.values())) for sets in candidates.values())]
    for tokens, experts in zip(continued, kept, strict=True):
        greedy: Any = sliced_model(model, experts)
        expected = greedy.generate(
            ids[:2, :4],
            attention_mask=torch.ones_like(ids[:2, :4]),
            max_new_tokens=ids.shape[1] - 4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(tokens, expected[:, 4:])
    assert not torch.equal(continued[0], continued[1])


def test_candidates_are_selected_in_the_dense_model_and_compared_on_other_windows(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_choice, "NEW_TOKENS", 2)
    model = mixture_model("olmoe")
    choice, _ = _result(lambda: _chooser(model).choose(ids, 6))
    # Every fifth window is held out.
    assert len(ids) == 7
    chooser, held_out = _chooser(model), ids[4:5]
    sets: dict[str, dict[int, list[int]]] = {}
    for block, mixture in find_mixture_blocks(model):
        inputs = inputs_of(model, ids[[0, 1, 2, 3, 5, 6]], block.index)
        tokens = record_tokens(mixture, block, inputs, device=_CPU, tokens=SELECTION_TOKENS)
        for name, kept in candidate_sets(expert_problem(mixture, tokens), 6).items():
            sets.setdefault(name, {})[block.index] = kept
    assert choice.kept == sets[choice.name]
    divergences, _ = _result(lambda: chooser.divergences(sets, held_out))
    assert [quality.kl for quality in choice.measured.values()] == pytest.approx(divergences, rel=1e-5)
    assert list(choice.measured) == ["joint", "REAP", "MSAN"]


@pytest.mark.parametrize(
    ("repetitions", "chosen"), [((0.3, 0.1), "second"), ((0.25, 0.0), "first"), ((0.9, 0.8), "first")]
)
def test_a_candidate_whose_text_repeats_itself_loses(repetitions: tuple[float, float], chosen: str) -> None:
    first, second = repetitions
    measured = {"second": CandidateQuality(0.2, second), "first": CandidateQuality(0.1, first)}
    assert choose_candidate(measured, 0.05) == chosen


def test_the_repetition_rate_counts_phrases_that_occurred_before() -> None:
    assert repetition_rate(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 5)
    assert repetition_rate(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 10)
    assert repetition_rate(torch.tensor([[1, 2]])) == 0
