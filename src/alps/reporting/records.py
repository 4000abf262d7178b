"""What the steps of a run note of themselves: calibration, block matching, recovery. `report.json` is made of them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from alps.data.windows import Windows


class Record(BaseModel):
    """What every record is: unknown keys are refused when one is read."""

    model_config = ConfigDict(extra="forbid")


class CalibrationPart(Record):
    """A source of calibration windows, and how many are its."""

    source: str
    windows: int


class CalibrationRecord(Record):
    """The calibration windows: source, count, length, seed, hash of the token ids; parts, also where there is one."""

    source: str
    windows: int
    seqlen: int
    tokens: int
    seed: int | None
    sha256: str
    parts: list[CalibrationPart] = []


class ReconstructionRecord(Record):
    """Block matching of one block.

    Attributes:
        block: its index.
        before, after: loss on the held-back windows; equal when nothing was gained.
        steps, best_step: steps of Adam taken, and after which one the weights were kept; 0 for none.
    """

    block: int
    before: float
    after: float
    steps: int
    best_step: int


class ReconstructionRun(Record):
    """One block matching of a pruned checkpoint, as a step of its own; its blocks are in `RunReport.reconstructions`.

    Attributes:
        dense, pruned: as the user named them.
        epochs, rate: passes over the windows that were not held back, and Adam's step size at its largest.
        target: share of the dense stream that was aimed at.
        blocks: how many were looked at.
        zeros: of all sites, counted afterwards; as many as before.
        seconds: wall time of all blocks.
        calibration: all windows drawn; the last batches of them were held back.
    """

    dense: str
    pruned: str
    epochs: int
    target: float = 1.0
    rate: float
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
    """Divergence on the held-back windows after so many steps (None: not finite), and on the last training batch."""

    step: int
    kl: float | None
    training_kl: float | None


class DistillationReport(Record):
    """One recovery by distillation: not a part of the one-shot run, and never to be compared with one.

    Attributes:
        dense, pruned: the teacher and the student as the user named them.
        minutes, lr, batch_tokens: as asked for; `minutes` is None when steps were asked for.
        steps, tokens, seconds: what was done: optimiser steps, tokens trained on (repeated ones count again), wall time
            of training and checks.
        stopped: why it ended.
        best_step: the step whose weights were kept; 0 when no check was better than the start.
        trained_entries: kept weights, norms and biases that were trained.
        zeros: of all sites, counted afterwards; as many as before.
        kl_before, kl_after: mean over tokens of KL(dense || pruned), in nats, on the held-back windows, at the start
            and for the weights kept.
        checks: all of them.
        calibration: all windows drawn; the last `held_back_windows` of them were not trained on.
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
    """A perplexity: text, windows of seqlen tokens, tokens predicted, mean loss in nats, its exponential.

    `sha256` is of the windows' token ids; None in records of versions that did not take it.
    """

    model: str
    text: str
    windows: int
    seqlen: int
    predicted_tokens: int
    loss: float
    perplexity: float
    sha256: str | None = None


class ComparisonRecord(EvaluationRecord):
    """A perplexity beside that of a reference, the dense model, on the same windows.

    Attributes:
        reference: its name; reference_perplexity: on the same tokens; ratio: perplexity / reference_perplexity.
        kl: mean over predicted tokens of KL(reference || model), nats.
        agreement: fraction of them for which both models' most likely token is the same.
    """

    reference: str
    reference_perplexity: float
    ratio: float
    kl: float
    agreement: float


class Estimate(Record):
    """A figure and its standard error; None where there is none, as for a single item."""

    value: float
    stderr: float | None


class TaskRecord(Record):
    """One zero-shot task.

    Attributes:
        model, task: their names.
        metrics: by name, as lm-eval calls them: acc, acc_norm, perplexity.
        items: scored; None for a group of lm-eval's, which has only an average.
        num_fewshot: examples in the prompt.
        lm_eval: version of the package that scored it.
    """

    model: str
    task: str
    metrics: dict[str, Estimate]
    items: int | None
    num_fewshot: int
    lm_eval: str


def calibration_record(windows: Windows, seed: int | None) -> CalibrationRecord:
    """The record of windows; `seed` is None when a caller made them."""
    count, seqlen = windows.ids.shape
    return CalibrationRecord(
        source=windows.source,
        windows=count,
        seqlen=seqlen,
        tokens=windows.tokens,
        seed=seed,
        sha256=windows.sha256,
        parts=[CalibrationPart(source=name, windows=n) for name, n in windows.parts or [(windows.source, count)]],
    )
