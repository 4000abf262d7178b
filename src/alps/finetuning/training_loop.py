"""The training loop of recovery: steps under a budget, checks on held-back windows, and the best state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alps.core.errors import ConfigError
from alps.core.kl_divergence import kl_divergence
from alps.core.progress import Progress
from alps.finetuning.masked_adamw import MaskedAdamW
from alps.reporting.records import DistillationCheck

# Tokens per forward and backward pass.
_PASS_TOKENS = 1024
_WARM_UP = 0.05
_CHECKS = 10
_PATIENCE = 4


@dataclass(frozen=True)
class Schedule:
    """How long to train, and on what at a time.

    Attributes:
        seconds, steps: the budget; exactly one is given.
        batch: windows in a step.
        held_back: windows, the last ones, that are only checked on.
        seed: shuffles the others.
    """

    seconds: float | None
    steps: int | None
    batch: int
    held_back: int
    seed: int


@dataclass
class _Clock:
    """How much of the budget is spent: of the steps, or of the time before the last check."""

    schedule: Schedule
    started: float = field(default_factory=lambda: time.monotonic())
    steps: int = 0
    step_seconds: float = 0.0
    check_seconds: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def spent(self, ahead: float = 0.0) -> float:
        """Share of the budget that will be spent `ahead` steps from now."""
        if self.schedule.steps is not None:
            return (self.steps + ahead) / self.schedule.steps
        assert self.schedule.seconds is not None
        before_last_check = self.schedule.seconds - self.check_seconds
        return (self.elapsed + ahead * self.step_seconds) / before_last_check if before_last_check > 0 else math.inf

    @property
    def over(self) -> bool:
        """Whether one more step, and a check after it, do not fit."""
        return self.spent(1.0) > 1.0


@dataclass
class Distillation:
    """One training: the two models, the optimiser, the windows (windows, seqlen), and what has come of it so far."""

    dense: nn.Module
    pruned: nn.Module
    masters: MaskedAdamW
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
        self._texts = self.ids[: len(self.ids) - self.schedule.held_back]
        self.clock = _Clock(self.schedule)

    def train(self) -> None:
        """Take steps until the budget is spent or nothing more is gained, and leave the best state in the model.

        Raises:
            ConfigError: when the budget leaves no time for a step, or the models answer with NaN or infinity.
        """
        kept = self._check(None, [])
        if not kept:
            raise ConfigError("The divergence of the two models is not finite: use --dtype bfloat16 or float32.")
        self._guess_step()
        if self.clock.over:
            raise ConfigError(
                f"The time is up before a first step of about {self.clock.step_seconds:.1f} s and two checks of "
                f"{self.clock.check_seconds:.1f} s: give more --minutes, or lower --batch-tokens and --seqlen."
            )
        self.progress.start("recovery", self.schedule.steps or 100)
        try:
            kept = self._steps(kept)
        finally:
            self.progress.finish()
            self.masters.restore(kept)

    def _steps(self, kept: list[Tensor]) -> list[Tensor]:
        """The loop; returns the best state."""
        batches, shown, due = self._batches(), 0, 1 / _CHECKS
        while not self.clock.over:
            loss = self._step(next(batches))
            if not math.isfinite(loss):
                self.stopped = "loss or gradient not finite"
                break
            spent = self.clock.spent()
            if spent >= due or self.clock.over:
                due = math.floor(spent * _CHECKS + 1) / _CHECKS
                kept = self._check(loss, kept)
            ticks = self.clock.steps if self.schedule.steps else min(int(100 * spent), 100)
            for _ in range(shown, ticks):
                self.progress.step(f"KL {loss:.4f}, best held back {self.best:.4f}")
            shown = ticks
            if all(check.step > self.best_step for check in self.checks[-_PATIENCE:]):
                self.stopped = f"no improvement in {_PATIENCE} checks"
                break
        return kept

    def _check(self, loss: float | None, kept: list[Tensor]) -> list[Tensor]:
        """Take the divergence on the held-back windows; returns the best state so far."""
        start = time.monotonic()
        with torch.no_grad():
            parts = _parts(self._held_back)
            now = sum(float(self._divergence(part, self._held_back.numel())) for part in parts)
        finite = math.isfinite(now)
        self.checks.append(DistillationCheck(step=self.clock.steps, kl=now if finite else None, training_kl=loss))
        if finite and now < self.best:
            self.best, self.best_step = now, self.clock.steps
            kept = self.masters.snapshot()
        self.clock.check_seconds = max(self.clock.check_seconds, time.monotonic() - start)
        return kept

    def _step(self, batch: Tensor) -> float:
        """One optimiser step; returns the batch's divergence before it, NaN when the step could not be taken."""
        start = time.monotonic()
        spent = self.clock.spent(0.5)
        loss = 0.0
        for part in _parts(batch):
            with torch.enable_grad():
                divergence = self._divergence(part, batch.numel())
                divergence.backward()  # type: ignore[no-untyped-call]
            loss += float(divergence.detach())
        taken = self.masters.step(rate_share(spent))
        self.tokens += batch.numel()
        self.clock.steps += 1
        if self.clock.steps == 1:
            self.clock.step_seconds = 0.0
        self.clock.step_seconds = max(self.clock.step_seconds, time.monotonic() - start)
        return loss if taken else math.nan

    def _guess_step(self) -> None:
        """Until a step is seen: a backward pass costs two forward ones, so that a token costs two checked ones."""
        self.clock.step_seconds = 2 * self.clock.check_seconds * self._batch / len(self._held_back)

    @property
    def _batch(self) -> int:
        return min(self.schedule.batch, len(self._texts))

    def _divergence(self, ids: Tensor, count: int) -> Tensor:
        ids = ids.to(self.device)
        with torch.no_grad():
            target = self.dense(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return kl_divergence(self.pruned(input_ids=ids, use_cache=False).logits.flatten(0, 1), target, count)

    def _batches(self) -> Iterator[Tensor]:
        """Batches without end; the windows are shuffled anew whenever too few are left for one."""
        generator = torch.Generator().manual_seed(self.schedule.seed)
        while True:
            order = torch.randperm(len(self._texts), generator=generator)
            for chosen in torch.split(order, self._batch):
                if len(chosen) == self._batch:
                    yield self._texts[chosen]


def rate_share(spent: float) -> float:
    """Share of the largest step size when this share of the budget is spent: a linear warm-up, then half a cosine."""
    if spent < _WARM_UP:
        return spent / _WARM_UP
    return (1 + math.cos(math.pi * min((spent - _WARM_UP) / (1 - _WARM_UP), 1.0))) / 2


def _parts(windows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(windows, max(_PASS_TOKENS // windows.shape[1], 1))
