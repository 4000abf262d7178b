"""Token perplexity in the convention of the pruning papers.

The text (rows joined by a blank line) is tokenised once and cut into consecutive windows of `seqlen` tokens without
overlap. Each window predicts its tokens 2..seqlen from those before them. Perplexity is exp(sum of losses / number of
predicted tokens), as in Hugging Face's documentation for a stride equal to the length. The loss is summed over windows
and divided once, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.half_precision import half_matmul_in_float32
from alps.core.progress import NoProgress, Progress
from alps.data.windows import Windows
from alps.models.finite_logits import check_losses
from alps.reporting.records import EvaluationRecord, describe_origin

# Tokens per forward; float32 logits of a vocabulary of 128 k then take some 1 GB.
_BATCH_TOKENS = 2048
# Rows of logits that are converted to float32 at once.
LOSS_ROWS = 128
# Above it, the exponential exceeds float64.
_LARGEST_LOSS = 709.0


def measure_perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    name: str,
    device: torch.device,
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> EvaluationRecord:
    """Measure a causal language model on windows of tokens.

    Args:
        model: called with `input_ids`, in evaluation mode; moved to `device` and left there.
        windows: token ids (windows, seqlen).
        name: of the model in the record.
        device: for the model.
        progress: counts the batches.
        group: ranks among which the batches are distributed; all get the record of all windows.

    Raises:
        NotFinite: when logits are NaN or infinite, naming the first window of this rank, and the block.
    """
    progress = progress or NoProgress()
    training = model.training
    model = model.to(device).eval()
    parts = list(enumerate(batches(windows)))[group.rank :: group.size]
    total = torch.zeros((), dtype=torch.float64)
    progress.start(f"{name} on {windows.source}", len(parts))
    try:
        with torch.inference_mode(), half_matmul_in_float32(device, model):
            for number, batch in parts:
                losses = window_losses(model, batch.to(device))
                total += (part := losses.sum(dtype=torch.float64).cpu())
                if not math.isfinite(part):
                    where = window_name(windows, number)
                    check_losses(losses, model, batch.to(device), subject=f"Model '{name}'", where=where)
                progress.step("")
    finally:
        progress.finish()
        model.train(training)
    predicted = windows.ids.shape[0] * (windows.ids.shape[1] - 1)
    loss = float(group.all_reduce_sum(total)) / predicted
    return EvaluationRecord(
        model=name,
        text=windows.source,
        windows=windows.ids.shape[0],
        seqlen=windows.ids.shape[1],
        predicted_tokens=predicted,
        loss=loss,
        perplexity=perplexity(loss),
        sha256=windows.sha256,
        **describe_origin(windows.origin),
        bos=windows.bos,
    )


def perplexity(loss: float) -> float:
    """Return the exponential of a loss; infinite if no float64 holds it."""
    return math.exp(loss) if loss <= _LARGEST_LOSS else math.inf


def window_name(windows: Windows, batch: int) -> Callable[[int], str]:
    """Return the function that names a window of a batch in messages, by its number in the batch."""
    first = batch * len(batches(windows)[0])
    return lambda row: f"window {first + row + 1} of '{windows.source}'"


def batches(windows: Windows) -> tuple[Tensor, ...]:
    """Split windows (windows, seqlen) into batches of one forward each."""
    return torch.split(windows.ids, max(_BATCH_TOKENS // windows.ids.shape[1], 1))


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Run a model on token ids (batch, seqlen); return its next-token losses in nats, float32, (batch, seqlen - 1)."""
    return token_losses(model(input_ids=ids, use_cache=False).logits, ids)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute next-token losses in nats, float32, (batch, seqlen - 1).

    Args:
        logits: (batch, seqlen, vocabulary), any float dtype.
        ids: token ids (batch, seqlen).
    """
    losses = []
    for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        # In chunks of rows: float32 copies of all logits would cost two more passes through memory.
        for part, labels in zip(torch.split(row, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
            scores = part.float()
            losses.append(scores.logsumexp(dim=-1) - scores.gather(1, labels[:, None]).squeeze(1))
    return torch.cat(losses).view(ids.shape[0], -1)
