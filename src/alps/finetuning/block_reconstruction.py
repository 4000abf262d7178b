"""Block matching: tune the kept weights of a pruned block until it answers like the dense block.

legend  Y    output of the pruned block on the pruned prefix's inputs     (tokens, features)
        Y_p  output of the dense block on the pruned prefix's inputs      (tokens, features)
        Y_d  output of the dense block on the dense model's inputs        (tokens, features)
        t    share of the dense stream, 0 to 1                            scalar
        T    what is aimed at, Y_p + t (Y_d - Y_p)                        (tokens, features)
The loss is the mean over tokens of ||Y - T||^2 / ||T||^2: relative to every token's own size, since a single
token with a massive activation can hold 98 % of the energy of a block's output (Sun et al., arXiv 2402.17762). The
supports stay as they are. After the last block, where the head reads, it is the mean over tokens of KL(dense || pruned)
between the predictions. Block-wise reconstruction of pruned models: EBFT (arXiv 2402.12419), transformer matching in
3BASiL (arXiv 2603.01376).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.lm_head import Head
from alps.core.distributed import ProcessGroup
from alps.core.errors import SolveFailed
from alps.core.kl_divergence import kl_divergence
from alps.finetuning.masked_adamw import MaskedAdamW, trainable_parameters
from alps.models.blocks import Block
from alps.reporting.records import ReconstructionRecord

# What the presets are measured with: docs/experiments.md, "A share of the dense hidden states".
DEFAULT_RECONSTRUCT_TARGET = 1.0


@dataclass(frozen=True)
class ReconstructionParameters:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the calibration windows.
        target: share of the dense stream in what is aimed at; 0 is what the dense block makes of the pruned prefix's
            inputs, 1 the dense model's own states.
        rate: Adam's step size, at its largest.
        floor: the step size falls along a cosine to this share of the largest.
        held_back: share of the windows kept apart, on which the best state is chosen.
        tokens: in a step.
        norms: tune norms and biases, too.
        checks: how often in an epoch the held-back windows are looked at.
    """

    epochs: int = 1
    target: float = DEFAULT_RECONSTRUCT_TARGET
    rate: float = 3e-4
    floor: float = 0.1
    held_back: float = 0.0625
    tokens: int = 2048
    norms: bool = True
    checks: int = 2


@dataclass(frozen=True)
class OutputLoss:
    """What follows the last block, and the token ids of every batch that its masks are made from."""

    head: Head
    ids: Sequence[Tensor]

    def loss(self, output: Tensor, target: Tensor, batch: int, window: int) -> Tensor:
        """Mean over the tokens of a window of KL(dense || pruned) in nats; both (1, tokens, features)."""
        ids = self.ids[batch][window : window + 1]
        with torch.no_grad():
            wanted = self.head(target, ids).flatten(0, -2)
        logits = self.head(output, ids).flatten(0, -2)
        return kl_divergence(logits, wanted, len(logits))


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2; tensors (..., features), computed in float32."""
    wanted = target.float()
    distance = (output.float() - wanted).square().sum(dim=-1)
    return (distance / wanted.square().sum(dim=-1).clamp_min(1e-12)).mean()


def reconstruct_block(
    block: Block,
    inputs: BlockInputs,
    targets: Sequence[Tensor],
    settings: ReconstructionParameters,
    device: torch.device,
    seed: int = 0,
    predictions: OutputLoss | None = None,
    peers: ProcessGroup | None = None,
    twin: Block | None = None,
) -> ReconstructionRecord:
    """Tune a pruned block in place.

    Args:
        block: pruned block, on `device`.
        inputs: what it receives from the pruned prefix.
        targets: the dense block's outputs on the dense model's inputs, batch by batch.
        settings: see `ReconstructionParameters`.
        device: where to compute.
        seed: shuffles the batches.
        predictions: for the last block: compare what the head makes of the outputs.
        peers: processes that have the other windows of every batch, and take the same steps.
        twin: the dense block, on `device`; not needed where only the dense stream is aimed at.

    Returns:
        What became of the loss; the block is left as it was unless the loss on the held-back windows fell.

    Raises:
        SolveFailed: when the loss is not finite before anything was tuned.
    """
    assert twin is not None or settings.target == 1, "without the dense block only the dense stream can be aimed at"

    def aimed_at(batch: int, window: int) -> Tensor:
        dense = targets[batch][window : window + 1].to(device)
        if twin is None or settings.target == 1:
            return dense
        with torch.no_grad():
            near = inputs.run(twin.index, twin.module, batch, device, window)
        return near.float().lerp(dense.float(), settings.target).to(dense.dtype)

    def loss_of(batch: int, window: int) -> Tensor:
        output = inputs.run(block.index, block.module, batch, device, window)
        target = aimed_at(batch, window)
        return relative_loss(output, target) if predictions is None else predictions.loss(output, target, batch, window)

    sizes = [len(one) for one in targets]
    tuning = _Tuning(block.index, loss_of, sizes, _totals(sizes, peers), settings, seed, peers)
    tuned = trainable_parameters(block, settings.norms)
    if not tuned:
        return tuning.untouched()
    # Nothing outside the block may take a gradient, the head least of all.
    whole = block.module if predictions is None else predictions.head.model
    near = nullcontext() if predictions is None else predictions.head.on(device)
    with near, torch.enable_grad(), MaskedAdamW(whole, tuned, settings.rate, torch.float64) as masters:
        return tuning.run(masters)


def _totals(sizes: Sequence[int], peers: ProcessGroup | None) -> list[int]:
    """Windows of every batch in all processes, of which one may have none of the last batch."""
    every: list[list[int]] = [list(sizes)] if peers is None else peers.all_gather_object(list(sizes))
    return [sum(one[i] for one in every if i < len(one)) for i in range(max(map(len, every)))]


@dataclass
class _Tuning:
    """The steps on one block, the checks on its held-back batches, and the best state.

    Windows go one by one, and their gradients and losses are added up in float64: the sums, and so the steps, do not
    depend on how the windows of a batch are shared out among processes.
    """

    index: int
    loss_of: Callable[[int, int], Tensor]
    sizes: Sequence[int]
    totals: Sequence[int]
    settings: ReconstructionParameters
    seed: int
    peers: ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.batches = len(self.totals)
        self._held = min(max(round(self.batches * self.settings.held_back), 1), self.batches - 1)

    def untouched(self) -> ReconstructionRecord:
        """The record of a block without anything to tune."""
        before = self._before()
        return ReconstructionRecord(block=self.index, before=before, after=before, steps=0, best_step=0)

    def run(self, masters: MaskedAdamW) -> ReconstructionRecord:
        training = list(range(self.batches - self._held))
        best = before = self._before()
        kept, best_step, step = masters.snapshot(), 0, 0
        generator = torch.Generator().manual_seed(self.seed)
        total = self.settings.epochs * len(training)
        due = max(len(training) // self.settings.checks, 1)
        for _ in range(self.settings.epochs):
            for batch in torch.randperm(len(training), generator=generator).tolist():
                self._descend(training[batch], masters)
                masters.step(self._share(step / total), self.totals[training[batch]])
                step += 1
                if step % due == 0 or step == total:
                    now = self._check()
                    if now < best:
                        best, best_step, kept = now, step, masters.snapshot()
        masters.restore(kept)
        return ReconstructionRecord(block=self.index, before=before, after=best, steps=step, best_step=best_step)

    def _descend(self, batch: int, masters: MaskedAdamW) -> None:
        for window in self._windows(batch):
            self.loss_of(batch, window).backward()  # type: ignore[no-untyped-call]
        if self.peers is not None:
            masters.all_reduce_grads(self.peers.all_reduce_sum)

    def _windows(self, batch: int) -> range:
        return range(self.sizes[batch] if batch < len(self.sizes) else 0)

    def _share(self, done: float) -> float:
        floor = self.settings.floor
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    def _before(self) -> float:
        loss = self._check()
        if not math.isfinite(loss):
            raise SolveFailed(f"Block {self.index}: its outputs are not finite: run with --dtype bfloat16 or float32.")
        return loss

    def _check(self) -> float:
        # A single batch is trained on and looked at, too.
        held_back = range(self.batches - self._held, self.batches) if self._held else [0]
        with torch.no_grad():
            mine = [
                sum(float(self.loss_of(batch, window)) for window in self._windows(batch)) / self.totals[batch]
                for batch in held_back
            ]
        loss = sum(mine) / len(held_back)
        return loss if self.peers is None else float(self.peers.all_reduce_sum(torch.tensor(loss, dtype=torch.float64)))
