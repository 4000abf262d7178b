"""Block matching: tune the kept weights of a pruned block until it answers like the dense block.

legend  Y    output of the pruned block on the pruned prefix's inputs     (tokens, features)
        Y_d  output of the dense block on the dense model's inputs        (tokens, features)
The loss is the mean over tokens of ||Y - Y_d||^2 / ||Y_d||^2: relative to every token's own size, since a single
token with a massive activation can hold 98 % of the energy of a block's output (Sun et al., arXiv 2402.17762). The
supports stay as they are. Block-wise reconstruction of pruned models: EBFT (arXiv 2402.12419), transformer matching
in 3BASiL (arXiv 2603.01376).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.capture import BlockInputs


@dataclass(frozen=True)
class Matching:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the calibration windows; 0 measures the loss only.
        rate: Adam's step size for weights, at its largest.
        norm_rate: the same for norms and biases; 0 leaves them as they are.
        held_back: share of the windows kept apart, on which the best epoch is chosen.
        floor: the step size falls along a cosine to this share of the largest.
        tokens: in a step.
        decay: AdamW's pull towards zero.
    """

    epochs: int = 4
    rate: float = 1e-4
    norm_rate: float = 0.0
    held_back: float = 0.125
    floor: float = 0.1
    tokens: int = 2048
    decay: float = 0.0


@dataclass
class MatchRecord:
    """One block: its loss on the held-back windows before and after, the epochs run and the one that was kept."""

    block: int
    before: float
    after: float
    epochs: int
    best_epoch: int


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2; tensors (..., features), computed in float32."""
    wanted = target.float()
    distance = (output.float() - wanted).square().sum(dim=-1)
    return (distance / wanted.square().sum(dim=-1).clamp_min(1e-12)).mean()


def match(
    block: Block, inputs: BlockInputs, targets: Sequence[Tensor], settings: Matching, device: torch.device
) -> MatchRecord:
    """Tune a pruned block in place.

    Args:
        block: pruned block, on `device`.
        inputs: what it receives from the pruned prefix.
        targets: the dense block's outputs on the dense model's inputs, batch by batch.
        settings: see `Matching`.
        device: where to compute.

    Returns:
        What became of the loss; the block is left as it was unless the loss on the held-back windows fell.
    """
    tuned = _Masters(block, settings)
    held = min(max(round(len(targets) * settings.held_back), 1), len(targets) - 1) if len(targets) > 1 else 0
    check = list(range(len(targets) - held, len(targets))) or [0]
    train = list(range(len(targets) - held))
    generator = torch.Generator().manual_seed(block.index)

    def loss_of(batch: int) -> Tensor:
        return relative_loss(inputs.run(block.index, block.module, batch, device), targets[batch].to(device))

    def checked() -> float:
        with torch.no_grad():
            return sum(float(loss_of(batch)) for batch in check) / len(check)

    best = before = checked()
    best_epoch, epoch = 0, 0
    kept = tuned.snapshot()
    total = settings.epochs * len(train)
    with _training(block.module):
        for epoch in range(1, settings.epochs + 1):
            for step, number in enumerate(torch.randperm(len(train), generator=generator).tolist()):
                done = ((epoch - 1) * len(train) + step) / max(total, 1)
                share = settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * done)) / 2
                loss_of(train[number]).backward()
                tuned.step(share)
            now = checked()
            if now < best:
                best, best_epoch = now, epoch
                kept = tuned.snapshot()
    tuned.restore(kept)
    return MatchRecord(block.index, before, best, epoch, best_epoch)


class _Masters:
    """float32 masters of a block's tuned parameters, their supports, and Adam."""

    def __init__(self, block: Block, settings: Matching) -> None:
        weights = {id(site.module.weight) for site in block.sites}
        self._all = list(block.module.parameters())
        for parameter in self._all:
            parameter.requires_grad_(False)
        self._tuned = [p for p in self._all if id(p) in weights or (settings.norm_rate and p.ndim == 1)]
        self._masters = [p.detach().float().clone() for p in self._tuned]
        self._masks = [(p != 0).to(p.dtype) if id(p) in weights else None for p in self._tuned]
        rates = [settings.rate if id(p) in weights else settings.norm_rate for p in self._tuned]
        groups = [{"params": [m], "lr": r, "rate": r} for m, r in zip(self._masters, rates, strict=True)]
        self._adam = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay)
        for parameter in self._tuned:
            parameter.requires_grad_(True)

    def step(self, share: float) -> None:
        """One step of Adam at this share of its largest size."""
        for parameter, master, mask in zip(self._tuned, self._masters, self._masks, strict=True):
            assert parameter.grad is not None
            master.grad = (parameter.grad if mask is None else parameter.grad.mul_(mask)).float()
            parameter.grad = None
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * share
        self._adam.step()
        self._publish()

    def _publish(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self._tuned, self._masters, strict=True):
                parameter.copy_(master)

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._tuned]

    def restore(self, kept: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._tuned, kept, strict=True):
                parameter.copy_(value)
        for parameter in self._all:
            parameter.requires_grad_(True)
            parameter.grad = None


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    with torch.enable_grad():
        yield
