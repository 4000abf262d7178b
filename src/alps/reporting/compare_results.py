"""Results of comparisons: one record per run, a line of JSON in results.jsonl, for tables and pages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from alps.checkpoints.atomic_io import write_text
from alps.core.errors import CheckpointError, truncate
from alps.core.json_text import to_json
from alps.reporting.records import CalibrationRecord, ComparisonRecord, EvaluationRecord, Record, TaskRecord
from alps.reporting.run_report import LayerRecord, RunReport

RESULTS_NAME = "results.jsonl"
DENSE = "dense"
# Traces are long: a result keeps those of this many layers, see `Result.from_report`.
_TRACES = 3


class SupportCheck(Record):
    """Check of ALPS's support during a solve.

    Attributes:
        iteration: of ADMM.
        rho: penalty.
        support_change: entries that entered or left the support since the last check.
        gap: ||W - D|| / ||W||.
        error: relative reconstruction error of D; None if it was not measured.
    """

    iteration: int
    rho: float
    support_change: int
    gap: float
    error: float | None = None


class LayerResult(Record):
    """Result for one pruned layer.

    Attributes:
        name, block, kind, entries, zeros: as in `alps.reporting.run_report.LayerRecord`.
        error, magnitude_error: relative reconstruction error, and the one that magnitude pruning leaves on the same
            inputs; None if they were not measured.
        trace: checks of the solve; empty except for a few layers pruned by ALPS.
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
    """Greedy continuation of a prompt by a model.

    Attributes:
        prompt: as the user gave it.
        text: that follows the prompt.
    """

    prompt: str
    text: str


class Result(Record):
    """Result of one run: a method at a pattern with a seed, or the dense model.

    Attributes:
        schema_version: of this record.
        model, model_sha256: name as the user gave it, and hash of the dense weights and configuration; the hash is None
            if it was not taken.
        architecture, dtype, device: class of the model, dtype of its weights, where it was pruned.
        method: name with its settings: `alps`, `best`, `wanda+refit`; `dense` for the dense model.
        pattern: `0.7` or `2:4`; empty for the dense model.
        seed: of the draw of the calibration windows; None for the dense model.
        settings: of the run, resolved, as in `alps.yaml`.
        calibration: windows, their source and hash; None for runs that read no inputs.
        sparsity, mean_error, mean_magnitude_error: see `alps.reporting.run_report.RunReport`.
        layers: all pruned layers, in the order of their solves.
        evaluations: perplexities, with the divergence from the dense model.
        tasks: zero-shot scores.
        continuations: of the prompts of the comparison.
        seconds: wall time by phase, see `alps.reporting.run_report.PHASES`.
        peak_host_bytes, peak_device_bytes: as in the report of the run.
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
        """Method, pattern and seed, which identify a run within a comparison."""
        return self.method, self.pattern, self.seed

    @classmethod
    def from_report(cls, report: RunReport, method: str | None = None, **fields: Any) -> Result:
        """Make the result of a run; it keeps the traces of the layers with the least, the median and the largest error.

        Args:
            report: of one pruning run.
            method: name in tables; None for the report's own.
            fields: those that a report does not hold, and those that replace the report's.
        """
        traced = _traced_layers(report.layers)
        from_report = {
            **{name: getattr(report, name) for name in ("model", "architecture", "dtype", "device", "calibration")},
            **{name: getattr(report, name) for name in ("sparsity", "mean_error", "mean_magnitude_error")},
            **{name: getattr(report, name) for name in ("seconds", "peak_host_bytes", "peak_device_bytes", "versions")},
            "model_sha256": None,
            "method": report.method if method is None else method,
            "pattern": report.pattern,
            "seed": report.calibration.seed if report.calibration else None,
            "layers": [_layer_result(layer, layer.name in traced) for layer in report.layers],
            "evaluations": report.evaluations,
        }
        return cls(**{**from_report, **fields})


def _traced_layers(layers: Sequence[LayerRecord]) -> set[str]:
    """Choose the traced layers with the least, the median and the largest error.

    Layers whose error was measured along the trace are preferred.

    Returns:
        Their names.
    """
    traced = sorted(
        (layer for layer in layers if layer.solve.get("trace")), key=lambda layer: (layer.error or 0.0, layer.name)
    )
    traced = [layer for layer in traced if layer.solve["trace"][0].get("error") is not None] or traced
    indices = {round(i * (len(traced) - 1) / (_TRACES - 1)) for i in range(_TRACES)} if traced else set()
    return {traced[index].name for index in indices}


def _layer_result(layer: LayerRecord, with_trace: bool) -> LayerResult:
    return LayerResult(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        entries=layer.entries,
        zeros=layer.zeros,
        error=layer.error,
        magnitude_error=layer.magnitude_error,
        trace=[SupportCheck.model_validate(check) for check in layer.solve["trace"]] if with_trace else [],
    )


def read_results(path: Path) -> list[Result]:
    """Read the results of a file in order; return none if it does not exist.

    Raises:
        CheckpointError: for a line that is no result, with its number.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"'{path}' cannot be read: remove or replace it.") from None
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = truncate(".".join(map(str, first["loc"])))
            raise CheckpointError(
                f"'{path}', line {number}: not a result of this program ({where + ': ' if where else ''}"
                f"{first['msg'].lower()}): remove the line or the file."
            ) from None
    return results


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Replace a file of results atomically, so that a kill leaves either the old or the new one."""
    write_text(path, "".join(to_json(r.model_dump(mode="json")) + "\n" for r in results))


class MeanStd(Record):
    """Mean of a value over seeds, and its sample standard deviation.

    Attributes:
        mean: infinite if a value is.
        deviation: None for one seed, infinite if a value is.
        count: number of seeds.
    """

    mean: float
    deviation: float | None
    count: int

    def text(self, form: str) -> str:
        """Format as `123.4`, or as `123.4 ± 5.6` for several seeds; `form` is the format of both numbers."""
        mean = format(self.mean, form)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, form)}"


def mean_std(values: Sequence[float]) -> MeanStd:
    """Compute mean and sample standard deviation of at least one value."""
    assert values
    deviation = None
    if len(values) > 1:
        deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf
    return MeanStd(mean=sum(values) / len(values), deviation=deviation, count=len(values))
