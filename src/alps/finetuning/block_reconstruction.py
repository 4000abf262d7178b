"""Block reconstruction: tune the kept weights of a pruned block until its outputs are like the dense block's.

legend  Y    output of the pruned block on the pruned model's inputs      (tokens, features)
        Y_p  output of the dense block on the pruned model's inputs       (tokens, features)
        Y_d  output of the dense block on the dense model's inputs        (tokens, features)
        t    share of Y_d in the target, 0 to 1                           scalar
        T    target, Y_p + t (Y_d - Y_p)                                  (tokens, features)
The loss is the mean over tokens of ||Y - T||^2 / ||T||^2. It is relative to every token's own size, since a single
token with a massive activation can hold 98 % of the energy of a block's output (Sun et al., arXiv 2402.17762). The
supports stay unchanged. After the last block, which the head reads, the loss is the mean over tokens of
KL(dense || pruned) between the predictions, with t = 1: a best guess is right for a prediction, while later blocks
cannot copy from a hidden state that is one. Block-wise reconstruction of pruned models: EBFT (arXiv 2402.12419),
transformer matching in 3BASiL (arXiv 2603.01376).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.lm_head import LMHead
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import SolveFailed
from alps.core.kl_divergence import kl_divergence
from alps.finetuning.masked_adamw import MaskedAdamW, trainable_parameters
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block
from alps.reporting.records import ReconstructionRecord


@dataclass(frozen=True)
class OutputLoss:
    """Loss of the model's predictions as a function of the last block's outputs.

    Attributes:
        head: modules after the last block.
        ids: token ids of every batch, from which the head's masks are made.
    """

    head: LMHead
    ids: Sequence[Tensor]

    def loss(self, output: Tensor, target: Tensor, batch: int, window: int) -> Tensor:
        """Return the mean over the tokens of a window of KL(dense || pruned) in nats.

        Args:
            output: of the pruned block, shape (1, tokens, features).
            target: of the same shape.
            batch: number of the batch.
            window: number of the window in the batch.
        """
        ids = self.ids[batch][window : window + 1]
        with torch.no_grad():
            reference = self.head(target, ids).flatten(0, -2)
        logits = self.head(output, ids).flatten(0, -2)
        return kl_divergence(logits, reference, len(logits))


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of ||output - target||^2 / ||target||^2 in float32, for tensors (..., features)."""
    target = target.float()
    distance = (output.float() - target).square().sum(dim=-1)
    return (distance / target.square().sum(dim=-1).clamp_min(1e-12)).mean()


def reconstruct_block(
    block: Block,
    inputs: BlockInputs,
    dense_outputs: Sequence[Tensor],
    parameters: ReconstructionParameters,
    *,
    device: torch.device,
    dense_block: Block | None = None,
    output_loss: OutputLoss | None = None,
    seed: int = 0,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ReconstructionRecord:
    """Tune a pruned block in place; without a lower loss on the held-back windows it stays unchanged.

    Args:
        block: pruned block, on `device`.
        inputs: of the block in the pruned model.
        dense_outputs: the dense block's outputs in the dense model, batch by batch; `inputs` may have more batches.
        parameters: of the training.
        device: where to compute.
        dense_block: the dense block, on `device`; not needed for a target of 1.
        output_loss: for the last block, loss of the model's predictions.
        seed: shuffles the batches.
        group: ranks that have the other windows of every batch, and take the same steps.

    Returns:
        The losses before and after.

    Raises:
        SolveFailed: when the loss is not finite before anything was tuned.
    """
    share = parameters.target if output_loss is None else 1.0
    assert dense_block is not None or share == 1, "a target below 1 needs the dense block"
    targets: dict[tuple[int, int], Tensor] = {}

    def target_of(batch: int, window: int) -> Tensor:
        dense = dense_outputs[batch][window : window + 1]
        if dense_block is None or share == 1:
            return dense.to(device)
        if (batch, window) not in targets:
            with torch.no_grad():
                local = inputs.run(dense_block.index, dense_block.module, batch, device, window=window)
            mixed = local.float().lerp(dense.to(device).float(), share).to(dense)
            targets[batch, window] = inputs.activations.store(mixed)
        return targets[batch, window].to(device)

    def loss_of(batch: int, window: int) -> Tensor:
        output = inputs.run(block.index, block.module, batch, device, window=window)
        target = target_of(batch, window)
        return relative_loss(output, target) if output_loss is None else output_loss.loss(output, target, batch, window)

    sizes = [len(outputs) for outputs in dense_outputs]
    training = _Training(
        index=block.index,
        loss_of=loss_of,
        sizes=sizes,
        total_sizes=_total_sizes(sizes, group),
        window_tokens=inputs.window_tokens,
        parameters=parameters,
        seed=seed,
        group=group,
    )
    trainable = trainable_parameters(block, parameters.norms)
    if not trainable:
        return training.skip()
    # Nothing outside the block may take a gradient, the head least of all.
    module = block.module if output_loss is None else output_loss.head.model
    head = nullcontext() if output_loss is None else output_loss.head.on(device)
    with head, torch.enable_grad(), MaskedAdamW(module, trainable, parameters.lr, torch.float64) as optimiser:
        return training.run(optimiser)


def _total_sizes(sizes: Sequence[int], group: ProcessGroup) -> list[int]:
    """Return the windows of every batch on all ranks; a rank may have none of the last batch."""
    ranks: list[list[int]] = group.all_gather_object(list(sizes))
    return [sum(counts[i] for counts in ranks if i < len(counts)) for i in range(max(map(len, ranks)))]


@dataclass
class _Training:
    """Steps on one block, losses on its held-back batches, and the best state.

    Windows are run one by one, and their gradients and losses are added up in float64. The sums, and so the steps, do
    not depend on how the windows of a batch are shared among ranks.

    Attributes:
        index: of the block.
        loss_of: of a batch and a window.
        sizes: windows of every batch on this rank.
        total_sizes: windows of every batch on all ranks.
        window_tokens: tokens of a window.
        parameters, seed, group: see `reconstruct_block`.
    """

    index: int
    loss_of: Callable[[int, int], Tensor]
    sizes: Sequence[int]
    total_sizes: Sequence[int]
    window_tokens: int
    parameters: ReconstructionParameters
    seed: int
    group: ProcessGroup

    def __post_init__(self) -> None:
        self.batches = len(self.total_sizes)
        self._held_back = min(max(round(self.batches * self.parameters.held_back), 1), self.batches - 1)

    def skip(self) -> ReconstructionRecord:
        """Return the record of a block that has nothing to tune."""
        before = self._first_loss()
        return ReconstructionRecord(block=self.index, before=before, after=before, steps=0, best_step=0)

    def run(self, optimiser: MaskedAdamW) -> ReconstructionRecord:
        """Take all steps, and leave the block in the state of the lowest loss."""
        schedule = self._schedule()
        best = before = self._first_loss()
        state, best_step, step = optimiser.snapshot(), 0, 0
        steps = len(schedule)
        interval = max(min(self.batches - self._held_back, steps) // self.parameters.checks, 1)
        for batch in schedule:
            self._add_gradients(batch, optimiser)
            optimiser.step(self._rate_share(step / steps), self.total_sizes[batch])
            step += 1
            if step % interval == 0 or step == steps:
                loss = self._held_back_loss()
                if loss < best:
                    best, best_step, state = loss, step, optimiser.snapshot()
        optimiser.restore(state)
        return ReconstructionRecord(block=self.index, before=before, after=best, steps=step, best_step=best_step)

    def _schedule(self) -> list[int]:
        """Return the batch of every step: all but those held back, in a new order each epoch, up to the limit."""
        generator = torch.Generator().manual_seed(self.seed)
        count = self.batches - self._held_back
        epochs = [torch.randperm(count, generator=generator).tolist() for _ in range(self.parameters.epochs)]
        batches = [batch for epoch in epochs for batch in epoch]
        if self.parameters.max_tokens is None:
            return batches
        limit, ends = self.parameters.max_tokens, accumulate(self.total_sizes[i] * self.window_tokens for i in batches)
        # One step is always taken.
        return batches[: max(sum(end <= limit for end in ends), 1)]

    def _add_gradients(self, batch: int, optimiser: MaskedAdamW) -> None:
        for window in self._windows(batch):
            self.loss_of(batch, window).backward()  # type: ignore[no-untyped-call]
        optimiser.all_reduce_grads(self.group.all_reduce_sum)

    def _windows(self, batch: int) -> range:
        return range(self.sizes[batch] if batch < len(self.sizes) else 0)

    def _rate_share(self, done: float) -> float:
        floor = self.parameters.floor
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    def _first_loss(self) -> float:
        loss = self._held_back_loss()
        if not math.isfinite(loss):
            raise SolveFailed(f"Block {self.index}: its outputs are not finite: run with --dtype bfloat16 or float32.")
        return loss

    def _held_back_loss(self) -> float:
        # A single batch is trained on and checked.
        batches = range(self.batches - self._held_back, self.batches) if self._held_back else [0]
        with torch.no_grad():
            losses = [
                sum(float(self.loss_of(batch, window)) for window in self._windows(batch)) / self.total_sizes[batch]
                for batch in batches
            ]
        return float(self.group.all_reduce_sum(torch.tensor(sum(losses) / len(batches), dtype=torch.float64)))
