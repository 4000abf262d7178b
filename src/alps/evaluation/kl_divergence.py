"""Divergence of a pruned model's predictions from the dense model's, on the windows of the perplexity.

Per predicted token: the Kullback-Leibler divergence KL(dense || pruned) = sum over the vocabulary of
p (log p - log q), in nats, with p of the reference and q of the pruned model; and the agreement of the most likely
tokens. Both perplexities come from the same two forwards. Perplexity uses the probability of one token, the divergence
the whole distribution, so it needs fewer tokens to distinguish two pruned models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import ConfigError, NotFinite
from alps.core.half_precision import half_matmul_in_float32
from alps.core.progress import NoProgress, Progress
from alps.data.windows import Windows
from alps.evaluation.perplexity import LOSS_ROWS, batches, perplexity, token_losses, window_name
from alps.models.finite_logits import check_logits
from alps.reporting.records import ComparisonRecord, describe_origin


def measure_divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: Windows,
    *,
    names: tuple[str, str],
    device: torch.device,
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ComparisonRecord:
    """Compare a causal language model with a reference on windows of tokens.

    Args:
        model: called with `input_ids`, in evaluation mode; moved to `device` and left there.
        reference: as the model.
        windows: token ids (windows, seqlen).
        names: of the model and of the reference in the record.
        device: for both models.
        progress: counts the batches.
        group: ranks among which the batches are distributed; all get the record of all windows.

    Raises:
        ConfigError: when the vocabularies have different sizes.
        NotFinite: when logits are NaN or infinite, naming the first window of this rank, and the block.
    """
    progress = progress or NoProgress()
    training = model.training, reference.training
    model, reference = model.to(device).eval(), reference.to(device).eval()
    parts = list(enumerate(batches(windows)))[group.rank :: group.size]
    sums = _Sums()
    progress.start(f"{names[0]} against {names[1]} on {windows.source}", len(parts))
    try:
        with torch.inference_mode(), half_matmul_in_float32(device, model, reference):
            for number, part in parts:
                pair = _logits(model, reference, part.to(device))
                if not sums.add(*pair, part.to(device)):
                    for net, logits, name in zip((model, reference), pair, names, strict=True):
                        where = window_name(windows, number)
                        check_logits(logits, net, part.to(device), subject=f"Model '{name}'", where=where)
                    raise NotFinite(
                        f"The divergence of '{names[0]}' from '{names[1]}' is infinite, since one of them never "
                        "predicts tokens that the other does: give no --reference."
                    )
                progress.step("")
    finally:
        progress.finish()
        model.train(training[0])
        reference.train(training[1])
    sums.values = group.all_reduce_sum(sums.values)
    return _record(sums, windows, names)


@dataclass
class _Sums:
    """Sums over predicted tokens, float64: losses of both models, divergences, and equal most likely tokens; nats."""

    values: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, logits: Tensor, expected: Tensor, ids: Tensor) -> bool:
        """Add a batch; return whether its sums are finite.

        Args:
            logits: of the model, (batch, seqlen, vocabulary).
            expected: logits of the reference, same shape.
            ids: token ids (batch, seqlen).
        """
        values = [token_losses(logits, ids), token_losses(expected, ids), *token_divergences(logits, expected)]
        sums = torch.stack([value.sum(dtype=torch.float64) for value in values]).cpu()
        self.values += sums
        return bool(sums.isfinite().all())


def token_divergences(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Compute divergence and agreement of all predictions except each window's last, which has no next token.

    Args:
        logits: of the model, (batch, seqlen, vocabulary), any float dtype.
        expected: logits of the reference, same shape.

    Returns:
        KL(reference || model) in nats, float32, and equality of the most likely tokens, bool; both
        (batch * (seqlen - 1),).
    """
    divergences, equal = [], []
    for rows, targets in zip(logits[:, :-1], expected[:, :-1], strict=True):
        for part, target in zip(torch.split(rows, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
            log_q, log_p = part.float().log_softmax(-1), target.float().log_softmax(-1)
            divergences.append(nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            equal.append(log_q.argmax(-1) == log_p.argmax(-1))
    return torch.cat(divergences), torch.cat(equal)


def _logits(model: nn.Module, reference: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits, expected = (net(input_ids=ids, use_cache=False).logits for net in (model, reference))
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
        perplexity=perplexity(loss),
        sha256=windows.sha256,
        **describe_origin(windows.origin),
        bos=windows.bos,
        reference=names[1],
        reference_perplexity=perplexity(reference_loss),
        ratio=perplexity(loss - reference_loss),
        kl=kl,
        agreement=agreement,
    )
