"""Choice among sets of kept experts for all blocks: divergence on held-out tokens, and a check of generated text.

A set that reproduces every mixture best need not predict best, and a good divergence does not exclude text that repeats
itself. So each candidate is run as a whole, with the removed experts out of the routers' reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.masked_router import Mixture, masked_routing
from alps.core.kl_divergence import kl_divergence

# Kept experts of every mixture of a model.
ExpertSets = Sequence[Sequence[int]]

# Text of a candidate may repeat itself by this much more than the dense model's. Shares of single prompts differ by
# some 0.3, so that this is two standard errors for eight prompts.
_MORE_REPETITION = 0.2
_PHRASE = 4


@dataclass(frozen=True)
class CandidateQuality:
    """Quality of a model with some of its experts, compared with the whole model.

    Attributes:
        kl: mean KL(dense || candidate) per token of the held-out windows, nats.
        repetition: share of repeated phrases of four tokens in greedy continuations.
    """

    kl: float
    repetition: float


@dataclass(frozen=True)
class ExpertChoice:
    """Candidate that was chosen, and what was measured.

    Attributes:
        name: of the candidate.
        measured: quality by the name of the candidate.
        dense_repetition: repetition of the model with all experts.
    """

    name: str
    measured: dict[str, CandidateQuality]
    dense_repetition: float


def choose_experts(
    mixtures: Sequence[Mixture],
    candidates: Mapping[str, ExpertSets],
    windows: Sequence[Tensor],
    *,
    logits: Callable[[Tensor], Tensor],
    continuations: Callable[[], Tensor],
) -> ExpertChoice:
    """Choose the candidate of lowest divergence, among those whose text does not repeat itself more.

    If the text of all candidates does, that of lowest divergence is chosen.

    Args:
        mixtures: of the model, with all experts and in memory.
        candidates: sets of kept experts in the order of the mixtures, by name; of equals the first is chosen.
        windows: batches of held-out token ids (windows, tokens).
        logits: runs the model on a batch, and returns logits (windows, tokens, vocabulary).
        continuations: lets the model continue some prompts greedily, and returns the new token ids (prompts, tokens).
    """
    with torch.no_grad():
        expected = [logits(ids).flatten(0, 1).cpu() for ids in windows]
        dense_repetition = repetition_rate(continuations())
        measured = {}
        for name, sets in candidates.items():
            with kept_experts(mixtures, sets):
                divergences = [
                    float(kl_divergence(logits(ids).flatten(0, 1), target.to(ids.device), 1))
                    for ids, target in zip(windows, expected, strict=True)
                ]
                measured[name] = CandidateQuality(
                    sum(divergences) / sum(map(len, expected)), repetition_rate(continuations())
                )
    fluent = [name for name in measured if measured[name].repetition <= dense_repetition + _MORE_REPETITION]
    best = min(fluent or measured, key=lambda name: measured[name].kl)
    return ExpertChoice(best, measured, dense_repetition)


@contextmanager
def kept_experts(mixtures: Sequence[Mixture], sets: ExpertSets) -> Iterator[None]:
    """Context in which every mixture routes tokens to its kept experts only."""
    with ExitStack() as stack:
        for mixture, kept in zip(mixtures, sets, strict=True):
            stack.enter_context(masked_routing(mixture, kept))
        yield


def repetition_rate(ids: Tensor) -> float:
    """Return the share of phrases of four tokens that occur earlier in the same row of token ids (rows, tokens)."""
    repeated = total = 0
    for row in ids.tolist():
        phrases = [tuple(row[i : i + _PHRASE]) for i in range(len(row) - _PHRASE + 1)]
        total += len(phrases)
        repeated += len(phrases) - len(set(phrases))
    return repeated / max(total, 1)
