"""Training loop of the distillation: steps within a budget, checks on held-back windows, and the best state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from alps.core.errors import ConfigError, NotFinite
from alps.core.kl_divergence import kl_divergence
from alps.core.progress import Progress
from alps.finetuning.masked_adamw import MaskedAdamW
from alps.models.finite_logits import check_logits
from alps.reporting.records import DistillationCheck

# Tokens per forward and backward pass.
_PASS_TOKENS = 1024
# Share of the budget in which the step size rises.
_WARM_UP = 0.05
# Checks within the budget, and how many without an improvement end the training.
_CHECKS = 10
_PATIENCE = 4


@dataclass(frozen=True)
class Schedule:
    """Budget and batches of a training.

    Attributes:
        seconds, steps: budget of wall time or of optimiser steps; exactly one is not None.
        batch: windows in a step.
        held_back: number of windows, the last ones, that only the checks use.
        seed: shuffles the training windows.
    """

    seconds: float | None
    steps: int | None
    batch: int
    held_back: int
    seed: int


@dataclass
class _Clock:
    """Share of the budget that is spent: of the steps, or of the time before the last check."""

    schedule: Schedule
    started: float = field(default_factory=lambda: time.monotonic())
    steps: int = 0
    step_seconds: float = 0.0
    check_seconds: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def spent(self, ahead: float = 0.0) -> float:
        """Return the share of the budget that will be spent `ahead` steps from now."""
        if self.schedule.steps is not None:
            return (self.steps + ahead) / self.schedule.steps
        assert self.schedule.seconds is not None
        before_last_check = self.schedule.seconds - self.check_seconds
        return (self.elapsed + ahead * self.step_seconds) / before_last_check if before_last_check > 0 else math.inf

    @property
    def is_over(self) -> bool:
        """True if another step, with a check after it, exceeds the budget."""
        return self.spent(1.0) > 1.0


@dataclass
class Distillation:
    """Training of a pruned model towards the dense one, with its state.

    Attributes:
        dense, pruned: teacher and student, on `device`, in evaluation mode.
        optimiser: of the student's parameters.
        ids: token ids (windows, seqlen), the held-back windows last.
        schedule: budget and batches.
        device: of the models.
        progress: counts steps, or hundredths of the time.
        tokens: trained on so far.
        best, best_step: least divergence on the held-back windows, nats per token, and its step.
        stopped: reason for the end.
        checks: so far.
    """

    dense: nn.Module
    pruned: nn.Module
    optimiser: MaskedAdamW
    ids: Tensor
    schedule: Schedule
    device: torch.device
    progress: Progress
    tokens: int = 0
    best: float = math.inf
    best_step: int = 0
    stopped: str = "budget spent"
    checks: list[DistillationCheck] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._held_back = self.ids[len(self.ids) - self.schedule.held_back :]
        self._training_windows = self.ids[: len(self.ids) - self.schedule.held_back]
        self.clock = _Clock(self.schedule)

    def train(self) -> None:
        """Take steps until the budget is spent or the checks stop improving; leave the best state in the model.

        Raises:
            ConfigError: when the budget leaves no time for a step.
            NotFinite: when the divergence is not finite before the first step.
        """
        best_state = self._check(None, [])
        if not best_state:
            self._refuse_divergence()
        self._estimate_step()
        if self.clock.is_over:
            raise ConfigError(
                f"The time is too short for a first step of about {self.clock.step_seconds:.1f} s and two checks of "
                f"{self.clock.check_seconds:.1f} s: give more --minutes, or lower --batch-tokens and --seqlen."
            )
        self.progress.start("distillation", self.schedule.steps or 100)
        try:
            best_state = self._run_steps(best_state)
        finally:
            self.progress.finish()
            self.optimiser.restore(best_state)

    def _refuse_divergence(self) -> NoReturn:
        """Raise the error for a divergence that is not finite; the models are run again on the held-back windows."""
        for model, words in ((self.dense, "The dense model"), (self.pruned, "The pruned model")):
            for number, ids in enumerate(torch.split(self._held_back.to(self.device), 1), 1):
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits
                where = f"held-back window {number}"
                check_logits(logits, model, ids, subject=words, where=where)
        raise NotFinite("The divergence of the two models is not finite: use --dtype bfloat16 or float32.")

    def _run_steps(self, best_state: list[Tensor]) -> list[Tensor]:
        """Run the loop; return the best state."""
        batches, reported, next_check = self._batches(), 0, 1 / _CHECKS
        while not self.clock.is_over:
            loss = self._step(next(batches))
            if not math.isfinite(loss):
                self.stopped = "loss or gradient not finite"
                break
            spent = self.clock.spent()
            if spent >= next_check or self.clock.is_over:
                next_check = math.floor(spent * _CHECKS + 1) / _CHECKS
                best_state = self._check(loss, best_state)
            ticks = self.clock.steps if self.schedule.steps else min(int(100 * spent), 100)
            for _ in range(reported, ticks):
                self.progress.step(f"KL {loss:.4f}, best held back {self.best:.4f}")
            reported = ticks
            if all(check.step > self.best_step for check in self.checks[-_PATIENCE:]):
                self.stopped = f"no improvement in {_PATIENCE} checks"
                break
        return best_state

    def _check(self, loss: float | None, best_state: list[Tensor]) -> list[Tensor]:
        """Measure the divergence on the held-back windows; return the best state so far."""
        start = time.monotonic()
        with torch.no_grad():
            parts = _split(self._held_back)
            divergence = sum(float(self._divergence(part, self._held_back.numel())) for part in parts)
        finite = math.isfinite(divergence)
        self.checks.append(
            DistillationCheck(step=self.clock.steps, kl=divergence if finite else None, training_kl=loss)
        )
        if finite and divergence < self.best:
            self.best, self.best_step = divergence, self.clock.steps
            best_state = self.optimiser.snapshot()
        self.clock.check_seconds = max(self.clock.check_seconds, time.monotonic() - start)
        return best_state

    def _step(self, batch: Tensor) -> float:
        """Take an optimiser step; return the batch's divergence before it, or NaN if the step could not be taken."""
        start = time.monotonic()
        spent = self.clock.spent(0.5)
        loss = 0.0
        for part in _split(batch):
            with torch.enable_grad():
                divergence = self._divergence(part, batch.numel())
                divergence.backward()  # type: ignore[no-untyped-call]
            loss += float(divergence.detach())
        taken = self.optimiser.step(rate_share(spent))
        self.tokens += batch.numel()
        self.clock.steps += 1
        if self.clock.steps == 1:
            self.clock.step_seconds = 0.0
        self.clock.step_seconds = max(self.clock.step_seconds, time.monotonic() - start)
        return loss if taken else math.nan

    def _estimate_step(self) -> None:
        """Estimate the time of the first step from the checks.

        A backward pass costs two forward passes, so a trained token costs two checked ones.
        """
        self.clock.step_seconds = 2 * self.clock.check_seconds * self._batch / len(self._held_back)

    @property
    def _batch(self) -> int:
        return min(self.schedule.batch, len(self._training_windows))

    def _divergence(self, ids: Tensor, count: int) -> Tensor:
        ids = ids.to(self.device)
        with torch.no_grad():
            target = self.dense(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return kl_divergence(self.pruned(input_ids=ids, use_cache=False).logits.flatten(0, 1), target, count)

    def _batches(self) -> Iterator[Tensor]:
        """Yield batches endlessly; the windows are shuffled again whenever too few are left for a batch."""
        generator = torch.Generator().manual_seed(self.schedule.seed)
        while True:
            order = torch.randperm(len(self._training_windows), generator=generator)
            for indices in torch.split(order, self._batch):
                if len(indices) == self._batch:
                    yield self._training_windows[indices]


def rate_share(spent: float) -> float:
    """Return the share of the largest step size at a spent share of the budget: linear warm-up, then half a cosine."""
    if spent < _WARM_UP:
        return spent / _WARM_UP
    return (1 + math.cos(math.pi * min((spent - _WARM_UP) / (1 - _WARM_UP), 1.0))) / 2


def _split(windows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(windows, max(_PASS_TOKENS // windows.shape[1], 1))
