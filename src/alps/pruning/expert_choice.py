"""Choice of the experts that all mixtures of a model keep, among the sets that several selections propose.

A set that reproduces every mixture best need not predict best, and a good divergence does not exclude text that repeats
itself. So each candidate is run as a whole, with the removed experts out of the routers' reach: on calibration windows
from which nothing is selected or fitted, and on greedy continuations of their beginnings. Every block is in memory
once for all candidates.

Functions here are generators that yield after every block, and return their result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.calibration.expert_records import SELECTION_TOKENS, expert_problem, record_tokens
from alps.calibration.expert_refit import HELD_OUT
from alps.calibration.lm_head import LMHead
from alps.calibration.masked_router import Mixture, find_mixture, masked_routing
from alps.core.kl_divergence import kl_divergence
from alps.models.blocks import Block, on_device
from alps.solvers.expert_selection import candidate_sets

# Kept experts of the mixtures of a model, by the index of the block.
ExpertSets = Mapping[int, Sequence[int]]

# Tokens that run through the dense model for the selections, and tokens of the divergence.
WALK_TOKENS, DIVERGENCE_TOKENS = 32768, 4096
# Prompts, and the tokens of each and of its continuation; less of both if windows are shorter.
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 48
# Text of a candidate may repeat itself by this much more than the dense model's. Shares of single prompts differ by
# some 0.3, so that this is two standard errors for eight prompts.
_MORE_REPETITION = 0.2
_PHRASE = 4

_Result = TypeVar("_Result")
Steps = Generator[None, None, _Result]


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
        kept: experts that it keeps, by the index of the block.
        measured: quality by the name of the candidate.
        dense_repetition: repetition of the model with all experts.
    """

    name: str
    kept: dict[int, list[int]]
    measured: dict[str, CandidateQuality]
    dense_repetition: float


@dataclass(frozen=True, kw_only=True)
class ExpertChooser:
    """Selection and comparison of sets of experts for one model.

    Attributes:
        model: with all experts, in evaluation mode; left unchanged.
        blocks: its decoder blocks; their weights may be in files.
        device: where the blocks run.
        activations: storage of the hidden states.
    """

    model: nn.Module
    blocks: Sequence[Block]
    device: torch.device
    activations: ActivationStore

    def choose(self, windows: Tensor, count: int) -> Steps[ExpertChoice]:
        """Choose `count` experts for each mixture: by joint replay, by REAP's scores or by MSAN's.

        Args:
            windows: calibration token ids (windows, tokens), at least two windows. Every fifth is held out, as in the
                refit.
            count: experts that each mixture keeps.
        """
        interval = min(HELD_OUT, len(windows))
        is_held_out = torch.arange(len(windows)) % interval == interval - 1
        tokens = windows.shape[1]
        selecting = windows[~is_held_out][: max(WALK_TOKENS // tokens, 1)]
        candidates = yield from self.select(selecting, count)
        held_out = windows[is_held_out][: max(DIVERGENCE_TOKENS // tokens, 1)]
        return (yield from self.compare(candidates, held_out))

    def select(self, windows: Tensor, count: int) -> Steps[dict[str, ExpertSets]]:
        """Return the sets that each selection keeps, from the inputs of mixtures in the dense model."""
        batch_size = max(batch_tokens(self.blocks, self.device) // windows.shape[1], 1)
        inputs = capture_block_inputs(self.model, self.blocks, windows, batch_size, activations=self.activations)
        sets: dict[str, dict[int, Sequence[int]]] = {}
        for block in self.blocks:
            with on_device(block, self.device):
                if (mixture := find_mixture(block)) is not None:
                    tokens = record_tokens(mixture, block, inputs, device=self.device, tokens=SELECTION_TOKENS)
                    for name, kept in candidate_sets(expert_problem(mixture, tokens), count).items():
                        sets.setdefault(name, {})[block.index] = kept
                inputs.advance(block.index, block.module, self.device)
            yield
        return dict(sets)

    def compare(self, candidates: Mapping[str, ExpertSets], windows: Tensor) -> Steps[ExpertChoice]:
        """Choose the candidate of lowest divergence, among those whose text does not repeat itself more.

        If the text of all candidates does, that of lowest divergence is chosen.

        Args:
            candidates: sets by name; of equals the first is chosen.
            windows: held-out token ids (windows, tokens).
        """
        divergences = yield from self.divergences(candidates, windows)
        continued = yield from self.continuations([{}, *candidates.values()], windows)
        dense_repetition, *repetitions = map(repetition_rate, continued)
        measured = {
            name: CandidateQuality(kl, repetition)
            for name, kl, repetition in zip(candidates, divergences, repetitions, strict=True)
        }
        best = choose_candidate(measured, dense_repetition)
        kept = {index: list(experts) for index, experts in candidates[best].items()}
        return ExpertChoice(best, kept, measured, dense_repetition)

    def divergences(self, candidates: Mapping[str, ExpertSets], windows: Tensor) -> Steps[list[float]]:
        """Return the mean KL(dense || candidate) per token in nats, candidate by candidate."""
        sets = [{}, *candidates.values()]
        head, (dense, *others) = yield from self._run(sets, [windows] * len(sets))
        totals = torch.zeros(len(others), dtype=torch.float64)
        with torch.no_grad(), head.on(self.device):
            for window in range(len(windows)):
                part = slice(window, window + 1)
                target = head(dense[part], windows[part]).flatten(0, -2)
                for i, hidden in enumerate(others):
                    logits = head(hidden[part], windows[part]).flatten(0, -2)
                    totals[i] += float(kl_divergence(logits, target, len(target))) / len(windows)
        return totals.tolist()

    def continuations(self, sets: Sequence[ExpertSets], windows: Tensor) -> Steps[list[Tensor]]:
        """Continue the beginnings of windows greedily with each set of experts; return the new token ids.

        All new tokens are guessed, then replaced by the likeliest tokens behind the guesses, until they no longer
        change. Every pass makes at least one more token final, so that the result is that of one token after the other.

        Args:
            sets: kept experts; an empty one keeps all.
            windows: token ids (windows, tokens).
        """
        prompt = min(PROMPT_TOKENS, windows.shape[1] // 2)
        length = min(prompt + NEW_TOKENS, windows.shape[1])
        ids = [windows[:PROMPTS, :length].clone() for _ in sets]
        active = list(range(len(sets)))
        for _ in range(length - prompt):
            head, outputs = yield from self._run([sets[i] for i in active], [ids[i] for i in active])
            changed = []
            with torch.no_grad(), head.on(self.device):
                for i, hidden in zip(active, outputs, strict=True):
                    tokens = torch.cat([_next_tokens(head, hidden, ids[i], row) for row in range(len(ids[i]))])
                    if not torch.equal(tokens[:, prompt - 1 : -1], ids[i][:, prompt:]):
                        ids[i][:, prompt:] = tokens[:, prompt - 1 : -1]
                        changed.append(i)
            active = changed
            if not active:
                break
        return [continued[:, prompt:] for continued in ids]

    def _run(self, sets: Sequence[ExpertSets], ids: Sequence[Tensor]) -> Steps[tuple[LMHead, list[Tensor]]]:
        """Run a batch of token ids with each set of experts; return the head, and the outputs of the last block."""
        inputs = capture_block_inputs(
            self.model, self.blocks, torch.cat(list(ids)), len(ids[0]), activations=self.activations
        )
        for block in self.blocks:
            with torch.no_grad(), on_device(block, self.device):
                mixture = find_mixture(block)
                for batch, kept in enumerate(sets):
                    with kept_experts(mixture, kept.get(block.index)):
                        output = inputs.forward(block.index, block.module, batch, self.device)
                    inputs.replace_batch(batch, output)
            yield
        return LMHead(self.model, self.blocks, inputs.calls.layout), inputs.hidden


def choose_candidate(measured: Mapping[str, CandidateQuality], dense_repetition: float) -> str:
    """Return the name of the candidate of lowest divergence, among those whose text does not repeat itself more."""
    fluent = [name for name in measured if measured[name].repetition <= dense_repetition + _MORE_REPETITION]
    return min(fluent or measured, key=lambda name: measured[name].kl)


@contextmanager
def kept_experts(mixture: Mixture | None, kept: Sequence[int] | None) -> Iterator[None]:
    """Context in which a mixture routes tokens to its kept experts only; None keeps all."""
    with ExitStack() as stack:
        if mixture is not None and kept is not None:
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


def _next_tokens(head: LMHead, hidden: Tensor, ids: Tensor, row: int) -> Tensor:
    """Return the likeliest token behind every token of one window, shape (1, tokens)."""
    return head(hidden[row : row + 1], ids[row : row + 1]).argmax(dim=-1).to(ids.device)
