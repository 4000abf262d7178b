"""The record of a run: what was pruned, how well, at what cost, and on which inputs. Becomes `report.json`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from alps.errors import CheckpointError
from alps.solvers.base import SolveInfo

REPORT_NAME = "report.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LayerRecord(_Record):
    """One site.

    Attributes:
        name, block, kind: dotted name, index of its block, last part of the name.
        shape: (out, in).
        entries, zeros: weights of the site, and how many of them are zero as written.
        error: relative reconstruction error of the weights as written, in the checkpoint's dtype; None when the
            run did not collect the Gram.
        magnitude_error: the same for magnitude pruning of this site on the same inputs.
        solve: the solver's own record, see `alps.solvers.base.SolveInfo`.
    """

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    entries: int
    zeros: int
    error: float | None
    magnitude_error: float | None
    solve: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.entries


class DenseRecord(_Record):
    """A parameter with two or more dimensions that was left dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


class CalibrationPart(_Record):
    """A source of calibration windows, and how many are its."""

    source: str
    windows: int


class CalibrationRecord(_Record):
    """The calibration windows: source, count, length, seed, hash of the token ids; parts, also where there is one."""

    source: str
    windows: int
    seqlen: int
    tokens: int
    seed: int | None
    sha256: str
    parts: list[CalibrationPart] = []


class MatchRecord(_Record):
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


class EvaluationRecord(_Record):
    """A perplexity: text, windows of seqlen tokens, tokens predicted, mean loss in nats, its exponential."""

    model: str
    text: str
    windows: int
    seqlen: int
    predicted_tokens: int
    loss: float
    perplexity: float


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


class Estimate(_Record):
    """A figure and its standard error; None where there is none, as for a single item."""

    value: float
    stderr: float | None


class TaskRecord(_Record):
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


class RecoveryCheck(_Record):
    """Divergence on the held-back windows after so many steps (None: not finite), and on the last training batch."""

    step: int
    kl: float | None
    training_kl: float | None


class RecoveryReport(_Record):
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
    checks: list[RecoveryCheck]
    calibration: CalibrationRecord
    held_back_windows: int
    dtype: str
    device: str
    peak_host_bytes: int
    peak_device_bytes: int
    versions: dict[str, str]


class RunReport(_Record):
    """Everything about one pruning run.

    Attributes:
        model: name as given by the user; architecture: its class.
        method, pattern: what was asked for.
        calibration: None for a method that reads no inputs.
        sites, dense: what was pruned, and what was not with the reason.
        seconds: wall time by phase: load, capture, forward (both passes of every block), gram, prepare, solve
            (admm, refit, sweep, select, swap inside it), errors, write, save, total.
        peak_host_bytes: largest resident size of the process; peak_device_bytes: of torch on a GPU.
        versions: packages, machine, commit.
        evaluations: perplexities measured in the same run, dense and pruned, if any.
        recovery: distillations since, in order. Everything else is as the one-shot run left it: the zeros still hold,
            the errors are those of the weights before.
    """

    model: str
    architecture: str
    method: str
    pattern: str
    dtype: str
    device: str
    calibration: CalibrationRecord | None
    sites: list[LayerRecord] = []
    matches: list[MatchRecord] = []
    dense: list[DenseRecord] = []
    seconds: dict[str, float] = {}
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    versions: dict[str, str] = {}
    evaluations: list[EvaluationRecord] = []
    recovery: list[RecoveryReport] = []

    @property
    def entries(self) -> int:
        """Weights of all sites."""
        return sum(site.entries for site in self.sites)

    @property
    def zeros(self) -> int:
        """Zeros of all sites."""
        return sum(site.zeros for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all sites."""
        return self.zeros / self.entries if self.entries else 0.0

    @property
    def mean_error(self) -> float | None:
        """Mean over sites of the relative reconstruction error; None when errors were not measured."""
        return _mean([site.error for site in self.sites])

    @property
    def mean_magnitude_error(self) -> float | None:
        """Mean over sites of what magnitude pruning would have left on the same inputs."""
        return _mean([site.magnitude_error for site in self.sites])

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Account for a phase outside the walk, in the total too."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.seconds["total"] = self.seconds.get("total", 0.0) + seconds

    def to_json(self) -> str:
        """The report with its summary first, as JSON."""
        summary = {
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "entries": self.entries,
            "mean_error": self.mean_error,
            "mean_magnitude_error": self.mean_magnitude_error,
        }
        return json.dumps({"summary": summary, **self.model_dump(mode="json")}, indent=1, allow_nan=False)

    @classmethod
    def read(cls, folder: Path) -> RunReport | None:
        """The report of a pruned directory; None when it has none.

        Raises:
            CheckpointError: when the file is there but is not such a report.
        """
        path = folder / REPORT_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            data.pop("summary", None)
            return cls.model_validate(data)
        except (ValueError, AttributeError, TypeError, ValidationError):
            raise CheckpointError(f"'{path}' is not a report of this program: remove or replace it.") from None


def solve_record(info: SolveInfo) -> dict[str, Any]:
    """A solver's record as plain JSON values."""
    return {**asdict(info), "status": str(info.status)}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
