"""Records of the steps of a run: calibration, evaluation, block reconstruction and distillation, as JSON holds them."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from alps.data.text_sources import Origin
from alps.data.windows import Windows

# Number that may be infinite, which is null in JSON.
LargeNumber = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(lambda value: None if math.isinf(value) else value, return_type=float | None),
]


class Record(BaseModel):
    """Base of all records; reading one with an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class CalibrationPart(Record):
    """Source of calibration windows, and their number.

    Attributes:
        source: of the text.
        windows: number of windows.
        format, documents: of the text, as it was read, and the number of its documents; None for other sources.
    """

    source: str
    windows: int
    format: str | None = None
    documents: int | None = None


class CalibrationRecord(Record):
    """Calibration windows of a run.

    Attributes:
        source: of the text, as the user named it.
        windows, seqlen, tokens: number of windows, tokens in each, tokens of all.
        seed: of the draw; None for windows that the caller made.
        sha256: hash of the token ids.
        parts: sources of the windows; a single text is listed as well.
        bos: whether every window was begun with the BOS token.
    """

    source: str
    windows: int
    seqlen: int
    tokens: int
    seed: int | None
    sha256: str
    parts: list[CalibrationPart] = []
    bos: bool = False


class ReconstructionRecord(Record):
    """Reconstruction of one block.

    Attributes:
        block: index of the block.
        before, after: loss on the held-back windows; equal if the block was left unchanged.
        steps: optimiser steps taken.
        best_step: step whose weights were kept; 0 if the block was left unchanged.
    """

    block: int
    before: float
    after: float
    steps: int
    best_step: int


class ReconstructionRun(Record):
    """Block reconstruction of a pruned checkpoint; the records of its blocks are in `RunReport.reconstructions`.

    Attributes:
        dense, pruned: names of the models as the user gave them.
        epochs: passes over the windows that were not held back.
        target: share of the dense model's own activations in the target, 0 to 1.
        lr: largest step size of Adam.
        blocks: number of reconstructed blocks.
        zeros: of all layers, counted afterwards; equal to the number before.
        seconds: wall time of all blocks.
        calibration: all windows drawn; the last batches of them were held back.
        dtype, device: of the weights, and where the model was tuned.
        peak_host_bytes, peak_device_bytes: as in `RunReport`.
        versions: packages, machine and commit.
    """

    dense: str
    pruned: str
    epochs: int
    target: float = 1.0
    lr: float
    blocks: int
    zeros: int
    seconds: float
    calibration: CalibrationRecord
    dtype: str
    device: str
    peak_host_bytes: int
    peak_device_bytes: int
    versions: dict[str, str]


class DistillationCheck(Record):
    """Divergence after some steps of a distillation.

    Attributes:
        step: optimiser steps taken so far.
        kl: on the held-back windows, nats per token; None if it was not finite.
        training_kl: on the last training batch; None before the first step.
    """

    step: int
    kl: float | None
    training_kl: float | None


class DistillationReport(Record):
    """Distillation of a pruned checkpoint; no part of the one-shot run, and not comparable with one.

    Attributes:
        dense, pruned: names of the teacher and the student as the user gave them.
        minutes: budget of wall time; None if the budget was a number of steps.
        lr: largest step size of Adam.
        batch_tokens: tokens in an optimiser step.
        stopped: reason for the end.
        steps, tokens: optimiser steps taken, and tokens trained on; a repeated token counts again.
        seconds: wall time of training and checks.
        best_step: step whose weights were kept; 0 if no check improved on the start.
        trained_entries: number of trained weights, norms and biases.
        zeros: of all layers, counted afterwards; equal to the number before.
        kl_before, kl_after: mean over tokens of KL(dense || pruned) in nats on the held-back windows, at the start
            and for the weights kept.
        checks: all checks in order.
        calibration: all windows drawn.
        held_back_windows: number of windows, the last ones, that were not trained on.
        dtype, device: of the weights, and where the model was trained.
        peak_host_bytes, peak_device_bytes: as in `RunReport`.
        versions: packages, machine and commit.
    """

    dense: str
    pruned: str
    minutes: float | None
    lr: float
    batch_tokens: int
    stopped: str
    steps: int
    best_step: int
    tokens: int
    seconds: float
    trained_entries: int
    zeros: int
    kl_before: float
    kl_after: float
    checks: list[DistillationCheck]
    calibration: CalibrationRecord
    held_back_windows: int
    dtype: str
    device: str
    peak_host_bytes: int
    peak_device_bytes: int
    versions: dict[str, str]


class EvaluationRecord(Record):
    """Perplexity of a model on a text.

    Attributes:
        model, text: names of both.
        windows, seqlen: number of windows, tokens in each.
        predicted_tokens: tokens whose loss was taken.
        loss: mean over them, nats.
        perplexity: exponential of the loss; infinite if no float64 holds it, above 709 nats, and null in JSON.
        sha256: hash of the windows' token ids; None in records of versions that did not take it.
        format, documents: of the text, as it was read, and the number of its documents; None if it is not known.
        bos: whether every window was begun with the BOS token.
    """

    model: str
    text: str
    windows: int
    seqlen: int
    predicted_tokens: int
    loss: float
    perplexity: LargeNumber
    sha256: str | None = None
    format: str | None = None
    documents: int | None = None
    bos: bool = False

    def perplexity_text(self, form: str) -> str:
        """Format the perplexity; in place of one that is too large, the loss."""
        return f"loss {self.loss:.1f}" if math.isinf(self.perplexity) else format(self.perplexity, form)


class ComparisonRecord(EvaluationRecord):
    """Perplexity of a model, compared with a reference, the dense model, on the same windows.

    Attributes:
        reference: name of the reference.
        reference_perplexity: perplexity of the reference.
        ratio: perplexity / reference_perplexity.
        kl: mean over predicted tokens of KL(reference || model), nats.
        agreement: fraction of predicted tokens for which both models have the same most likely token.
    """

    reference: str
    reference_perplexity: LargeNumber
    ratio: LargeNumber
    kl: float
    agreement: float


class Estimate(Record):
    """Value with its standard error.

    Attributes:
        value: of the metric, a mean over the items.
        stderr: None if there is none, as for a single item.
    """

    value: float
    stderr: float | None


class TaskRecord(Record):
    """Scores of a model on one zero-shot task.

    Attributes:
        model, task: names of both.
        metrics: by lm-eval's names: acc, acc_norm, perplexity.
        items: number of scored items; None for a group of lm-eval's, which has only an average.
        num_fewshot: examples in the prompt.
        lm_eval: version of the package that scored the items.
    """

    model: str
    task: str
    metrics: dict[str, Estimate]
    items: int | None
    num_fewshot: int
    lm_eval: str


def calibration_record(windows: Windows, seed: int | None) -> CalibrationRecord:
    """Describe calibration windows; `seed` is None for windows that the caller made."""
    count, seqlen = windows.ids.shape
    return CalibrationRecord(
        source=windows.source,
        windows=count,
        seqlen=seqlen,
        tokens=windows.tokens,
        seed=seed,
        sha256=windows.sha256,
        parts=[
            CalibrationPart(source=name, windows=number, **describe_origin(origin))
            for (name, number), origin in itertools.zip_longest(
                windows.parts or [(windows.source, count)], windows.origins
            )
        ],
        bos=windows.bos,
    )


def describe_origin(origin: Origin | None) -> dict[str, Any]:
    """Return the fields `format` and `documents` of a record of a text."""
    return {} if origin is None else {"format": origin.format, "documents": origin.documents}
