"""Runs as records that can be compared: one JSON line each, everything that a table or a page about them needs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from alps.checkpoints.atomic_io import write_text
from alps.core.errors import CheckpointError, truncate
from alps.reporting.records import CalibrationRecord, ComparisonRecord, EvaluationRecord, Record, TaskRecord
from alps.reporting.run_report import LayerRecord, RunReport

RESULTS_NAME = "results.jsonl"
DENSE = "dense"
# Traces are long: a result keeps those of so many sites, see `Result.from_report`.
_TRACES = 3


class SupportCheck(Record):
    """One check of ALPS's support: iteration, penalty, entries changed since the last, relative ||W - D||, and the
    relative reconstruction error of D; None where it was not taken.
    """

    iteration: int
    rho: float
    support_change: int
    gap: float
    error: float | None = None


class LayerResult(Record):
    """One site; `trace` is empty but for a few sites of ALPS.

    Attributes:
        name, block, kind, entries, zeros: as in `alps.reporting.run_report.LayerRecord`.
        error, magnitude_error: relative reconstruction error, and what magnitude pruning would have left on the same
            inputs; None when they were not measured.
        trace: the checks of the solve.
    """

    name: str
    block: int
    kind: str
    entries: int
    zeros: int
    error: float | None
    magnitude_error: float | None = None
    trace: list[SupportCheck] = Field(default_factory=list)


class Continuation(Record):
    """What a model wrote after a prompt, greedily."""

    prompt: str
    text: str


class Result(Record):
    """One run: a method at a pattern with a seed, or the dense model.

    Attributes:
        schema_version: of this record.
        model, model_sha256: name as given, and hash of the dense weights and configuration (None: not taken).
        architecture, dtype, device: class of the model, dtype of its weights, where it was pruned.
        method: as asked for, with its settings: `alps`, `best`, `wanda+refit`; `dense` for the dense model.
        pattern: `0.7` or `2:4` as asked for; empty for the dense model.
        seed: draws the calibration windows; None for the dense model.
        settings: of the run, resolved, as in `alps.yaml`.
        calibration: windows, their source and hash; None for what reads none.
        sparsity, mean_error, mean_magnitude_error: see `alps.reporting.run_report.RunReport`.
        layers: all of them, in the order in which they were solved.
        evaluations, tasks: perplexities with the divergence from the dense model, zero-shot scores.
        continuations: of the prompts that were asked for.
        seconds: wall time by phase; peak_host_bytes, peak_device_bytes: as in the run's report.
        versions: packages, machine and commit.
        finished: date and time in UTC, ISO 8601.
    """

    schema_version: Literal[1] = 1
    model: str
    model_sha256: str | None
    architecture: str
    dtype: str
    device: str
    method: str
    pattern: str
    seed: int | None
    settings: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    sparsity: float = 0.0
    mean_error: float | None = None
    mean_magnitude_error: float | None = None
    layers: list[LayerResult] = Field(default_factory=list)
    evaluations: list[ComparisonRecord | EvaluationRecord] = Field(default_factory=list)
    tasks: list[TaskRecord] = Field(default_factory=list)
    continuations: list[Continuation] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    finished: str = ""

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What tells runs of one comparison apart."""
        return self.method, self.pattern, self.seed

    @classmethod
    def from_report(cls, report: RunReport, method: str | None = None, **more: Any) -> Result:
        """A run's report as a result; it keeps the traces of the best, the middle and the worst site by error.

        Args:
            report: of one pruning run.
            method: name in tables; None for the report's own.
            more: fields that a report does not hold, and any that are to differ.
        """
        kept = _chosen(report.layers)
        fields = {
            **{name: getattr(report, name) for name in ("model", "architecture", "dtype", "device", "calibration")},
            **{name: getattr(report, name) for name in ("sparsity", "mean_error", "mean_magnitude_error")},
            **{name: getattr(report, name) for name in ("seconds", "peak_host_bytes", "peak_device_bytes", "versions")},
            "model_sha256": None,
            "method": report.method if method is None else method,
            "pattern": report.pattern,
            "seed": report.calibration.seed if report.calibration else None,
            "layers": [_site(site, site.name in kept) for site in report.layers],
            "evaluations": report.evaluations,
        }
        return cls(**{**fields, **more})


def _chosen(sites: Sequence[LayerRecord]) -> set[str]:
    """Names of the traced sites with the smallest, the middle and the largest error; first of those whose error was
    followed along the trace.
    """
    traced = sorted((s for s in sites if s.solve.get("trace")), key=lambda s: (s.error or 0.0, s.name))
    traced = [s for s in traced if s.solve["trace"][0].get("error") is not None] or traced
    places = {round(i * (len(traced) - 1) / (_TRACES - 1)) for i in range(_TRACES)} if traced else set()
    return {traced[place].name for place in places}


def _site(site: LayerRecord, traced: bool) -> LayerResult:
    return LayerResult(
        name=site.name,
        block=site.block,
        kind=site.kind,
        entries=site.entries,
        zeros=site.zeros,
        error=site.error,
        magnitude_error=site.magnitude_error,
        trace=[SupportCheck.model_validate(point) for point in site.solve["trace"]] if traced else [],
    )


def read_results(path: Path) -> list[Result]:
    """The results in a file, in its order; none where it does not exist.

    Raises:
        CheckpointError: for a line that is no result, with its number.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"'{path}' cannot be read: remove or replace it.") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Result.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = truncate(".".join(map(str, first["loc"])))
            raise CheckpointError(
                f"'{path}', line {number}: not a result of this program ({where + ': ' if where else ''}"
                f"{first['msg'].lower()}): remove the line or the file."
            ) from None
    return found


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Replace the file as a whole, so that a kill leaves the old one or the new one."""
    write_text(path, "".join(json.dumps(r.model_dump(mode="json"), allow_nan=False) + "\n" for r in results))


class MeanStd(Record):
    """Mean of a figure over seeds, its sample standard deviation (None for one seed), and how many there are."""

    mean: float
    deviation: float | None
    count: int

    def text(self, form: str) -> str:
        """As tables show it: `123.4`, or `123.4 ± 5.6` for several seeds."""
        mean = format(self.mean, form)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, form)}"


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation; infinite where a value is."""
    assert values
    deviation = None
    if len(values) > 1:
        deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf
    return MeanStd(mean=sum(values) / len(values), deviation=deviation, count=len(values))
