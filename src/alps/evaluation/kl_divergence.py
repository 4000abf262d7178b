"""How far a pruned model's predictions are from the dense model's, on the windows that perplexity is taken on.

Per predicted token: the Kullback-Leibler divergence KL(dense || pruned) = sum over the vocabulary of
p (log p - log q), in nats, with p of the reference and q of the pruned model; and whether the most likely token is
the same. Both perplexities come from the same two forwards. Perplexity asks for the one token that follows in the text;
the divergence compares whole predictions, so fewer tokens tell two pruned models apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.core.half_precision import half_matmul_in_float32
from alps.core.progress import NoProgress, Progress
from alps.data.windows import Windows
from alps.evaluation.perplexity import LOSS_ROWS, batches, token_losses
from alps.reporting.records import ComparisonRecord


def divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: Windows,
    names: tuple[str, str],
    device: torch.device,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> ComparisonRecord:
    """Compare a causal language model with a reference on windows of tokens.

    Args:
        model, reference: called with `input_ids`, in evaluation mode; moved to `device` and left there.
        windows: token ids (windows, seqlen).
        names: what to call the model and the reference in the record.
        device: where to run.
        watcher: told after every batch.
        group: processes that share out the batches; all get the record of all windows.

    Raises:
        ConfigError: when the two predict over vocabularies of different sizes.
    """
    progress, group = progress or NoProgress(), group or ProcessGroup()
    training = model.training, reference.training
    model, reference = model.to(device).eval(), reference.to(device).eval()
    parts = batches(windows)[group.rank :: group.size]
    sums = _Sums()
    progress.start(f"{names[0]} against {names[1]} on {windows.source}", len(parts))
    try:
        with torch.inference_mode(), half_matmul_in_float32(device, model, reference):
            for part in parts:
                sums.add(*_logits(model, reference, part.to(device)), part.to(device))
                progress.step("")
    finally:
        progress.finish()
        model.train(training[0])
        reference.train(training[1])
    sums.values = group.all_reduce_sum(sums.values)
    return _record(sums, windows, names)


@dataclass
class _Sums:
    """Over predicted tokens: losses of both in nats, divergences in nats, equal first choices; float64."""

    values: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, logits: Tensor, expected: Tensor, ids: Tensor) -> None:
        """Add a batch: logits of the model and of the reference (batch, seqlen, vocabulary), ids (batch, seqlen)."""
        parts = [one.sum(dtype=torch.float64) for one in (token_losses(logits, ids), token_losses(expected, ids))]
        parts += [one.sum(dtype=torch.float64) for one in token_divergences(logits, expected)]
        self.values += torch.stack(parts).cpu()


def token_divergences(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences and agreements of every prediction but each window's last, which no token of the text follows.

    Args:
        logits, expected: of the model and of the reference, (batch, seqlen, vocabulary), any float dtype.

    Returns:
        KL(reference || model) in nats, float32, and whether the first choices are equal, bool; both
        (batch * (seqlen - 1),).
    """
    divergences, equal = [], []
    for rows, wanted in zip(logits[:, :-1], expected[:, :-1], strict=True):
        for part, target in zip(torch.split(rows, LOSS_ROWS), torch.split(wanted, LOSS_ROWS), strict=True):
            log_q, log_p = part.float().log_softmax(-1), target.float().log_softmax(-1)
            divergences.append(nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            equal.append(log_q.argmax(-1) == log_p.argmax(-1))
    return torch.cat(divergences), torch.cat(equal)


def _logits(model: nn.Module, reference: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (model, reference))
    if logits.shape != expected.shape:
        raise ConfigError(
            f"The model predicts over {logits.shape[-1]} tokens and the reference over {expected.shape[-1]}: "
            "give the dense model that this one was pruned from."
        )
    return logits, expected


def _record(sums: _Sums, windows: Windows, names: tuple[str, str]) -> ComparisonRecord:
    count, seqlen = windows.ids.shape
    predicted = count * (seqlen - 1)
    loss, reference_loss, kl, agreement = (value / predicted for value in sums.values.tolist())
    return ComparisonRecord(
        model=names[0],
        text=windows.source,
        windows=count,
        seqlen=seqlen,
        predicted_tokens=predicted,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        sha256=windows.sha256,
        reference=names[1],
        reference_perplexity=math.exp(min(reference_loss, 700.0)),
        ratio=math.exp(min(loss - reference_loss, 700.0)),
        kl=kl,
        agreement=agreement,
    )
