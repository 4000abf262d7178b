"""Token perplexity as the pruning papers take it.

The text (rows joined by a blank line) is tokenised once, cut into consecutive windows of `seqlen` tokens without
overlap, and each window predicts its tokens 2..seqlen from those before them. Perplexity is exp(sum of losses /
number of predicted tokens): the convention of Hugging Face's documentation for a stride equal to the length.
The loss is summed over windows and divided once, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from alps.core.distributed import ProcessGroup
from alps.core.half_precision import half_matmul_in_float32
from alps.core.progress import NoProgress, Progress
from alps.data.windows import Windows
from alps.reporting.records import EvaluationRecord

# Tokens per forward: the logits of a 128 k vocabulary stay near 1 GB in float32.
_BATCH_TOKENS = 2048
# Rows of logits that are in float32 at a time.
LOSS_ROWS = 128


def perplexity(
    model: nn.Module,
    windows: Windows,
    name: str,
    device: torch.device,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> EvaluationRecord:
    """Measure a causal language model on windows of tokens.

    Args:
        model: called with `input_ids`, in evaluation mode; moved to `device` and left there.
        windows: token ids (windows, seqlen).
        name: what to call the model in the record.
        device: where to run.
        watcher: told after every batch.
        group: processes that share out the batches; all get the record of all windows.
    """
    progress, group = progress or NoProgress(), group or ProcessGroup()
    training = model.training
    model = model.to(device).eval()
    parts = batches(windows)[group.rank :: group.size]
    total = torch.zeros((), dtype=torch.float64)
    progress.start(f"{name} on {windows.source}", len(parts))
    try:
        with torch.inference_mode(), half_matmul_in_float32(device, model):
            for batch in parts:
                total += window_losses(model, batch.to(device)).sum(dtype=torch.float64).cpu()
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
        perplexity=math.exp(min(loss, 700.0)),
        sha256=windows.sha256,
    )


def batches(windows: Windows) -> tuple[Tensor, ...]:
    """The windows (windows, seqlen) in batches of one forward each."""
    return torch.split(windows.ids, max(_BATCH_TOKENS // windows.ids.shape[1], 1))


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token losses in nats for windows (batch, seqlen): float32, shape (batch, seqlen - 1)."""
    return token_losses(model(input_ids=ids, use_cache=False).logits, ids)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The same from logits (batch, seqlen, vocabulary) in any float dtype."""
    losses = []
    for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        # A few rows of logits at a time: float32 copies of all of them would go through memory twice more.
        for part, wanted in zip(torch.split(row, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
            scores = part.float()
            losses.append(scores.logsumexp(dim=-1) - scores.gather(1, wanted[:, None]).squeeze(1))
    return torch.cat(losses).view(ids.shape[0], -1)
