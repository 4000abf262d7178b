"""Report of a pruning run: layers with errors and zeros, times, memory and inputs. It becomes `report.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from alps.core.errors import CheckpointError
from alps.core.json_text import to_json
from alps.reporting.records import (
    CalibrationRecord,
    DistillationReport,
    EvaluationRecord,
    ReconstructionRecord,
    ReconstructionRun,
    Record,
)
from alps.solvers.base import SolveInfo

REPORT_NAME = "report.json"

# Method of a report on a model that has lost whole structures; single weights may be zero, too.
STRUCTURED = "structured pruning"
# Share of zeros from which a model that has lost structures counts as sparse, too; weights may happen to be zero.
_SPARSE = 0.01

# Phases of a run, whose wall times are disjoint. A test compares them with those that the code records.
PHASES = {
    "load": "opening the model and its tokenizer",
    "allocation": "measurement of the layers' sensitivity, or of their errors, to distribute the zeros",
    "capture": "recording of the block inputs",
    "row_weights": "measurement of the row weights",
    "forward": "forward passes of all blocks, without the sums below",
    "gram": "sums of the input statistics",
    "prepare": "factorisations that layers of one input share",
    "solve": "solves of all layers; `INSIDE_SOLVE` are parts of it",
    "measure_error": "relative reconstruction errors",
    "communication": "exchange of statistics and weights between ranks",
    "reconstruct": "block reconstruction",
    "journal": "writing of finished blocks to the journal",
    "save": "writing of the checkpoint",
}
# Parts of the phase `solve`, recorded by the solvers.
INSIDE_SOLVE = {
    "admm": "ADMM iterations of ALPS",
    "refit": "least squares on the support",
    "select": "choice of the support by scores",
    "swap": "swaps of entries between support and zeros by DSnoT",
    "sweep": "column sweep of SparseGPT",
}


class LayerRecord(Record):
    """Result for one pruned layer.

    Attributes:
        name, block, kind: dotted name, index of the block, last part of the name.
        shape: (out, in).
        entries, zeros: number of weights, and number of zeros among the stored weights.
        error: relative reconstruction error of the stored weights, in the checkpoint's dtype; None if the run did not
            collect the Gram.
        magnitude_error: error that magnitude pruning of this layer leaves on the same inputs.
        solve: record of the solver, see `alps.solvers.base.SolveInfo`.
        expert: index of the expert, in a mixture that keeps all experts in one parameter; else None.
        tokens: calibration tokens that the layer received; None if the run had no calibration.
        pooled_tokens: average tokens of a pool that were added to the input statistics of an expert that received too
            few tokens, see `alps.calibration.moe_statistics`.
        pattern: pattern of this layer; None if it was not recorded.
        zeros_before: zeros before pruning if the run was to keep them; else None.
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
    expert: int | None = None
    tokens: int | None = None
    pooled_tokens: int = 0
    pattern: str | None = None
    zeros_before: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.entries


class DenseRecord(Record):
    """Parameter with two or more dimensions, or an expert's slice of one, that was left dense.

    Attributes:
        name, shape: of the parameter, or of the slice as (out, in).
        reason: why the parameter was left dense.
        rule: rule of `keep_dense` that keeps it; None if it could not have been pruned without the rule either.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    rule: str | None = None

    @property
    def entries(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class RunReport(Record):
    """Report of one pruning run.

    Attributes:
        model, architecture: name as the user gave it, and class of the model.
        method, pattern: as the user gave them.
        overrides: patterns of layers that have another one, by rule, see `alps.pruning.layer_rules`.
        dtype, device: of the weights, and where the model was pruned.
        calibration: None for a method that reads no inputs.
        layers: pruned layers in the order of their solves. Sparsity, zeros, entries and errors are theirs alone.
        reconstructions: of every block: those of the run itself, then those of `reconstruction_runs`, in order.
        reconstruction_runs: later block reconstructions of the checkpoint, in order, each with its calibration.
        dense: parameters that were left dense, with the reason.
        seconds: wall time by phase: those of `PHASES`, those of `INSIDE_SOLVE`, and `total`.
        peak_host_bytes, peak_device_bytes: largest resident size of the process, and torch's largest allocation on
            the GPU.
        versions: packages, machine and commit.
        notes: remarks on the run, as sentences.
        evaluations: perplexities of the pruned model, if they were measured in the same run.
        dense_evaluations: perplexities of the dense model, if they were measured in the same run.
        distillations: later distillations of the checkpoint, in order. All other fields are those of the one-shot run:
            the zeros still hold, the errors are those of the weights before distillation.
    """

    model: str
    architecture: str
    method: str
    pattern: str
    overrides: dict[str, str] = Field(default_factory=dict)
    dtype: str
    device: str
    calibration: CalibrationRecord | None
    layers: list[LayerRecord] = Field(default_factory=list)
    reconstructions: list[ReconstructionRecord] = Field(default_factory=list)
    reconstruction_runs: list[ReconstructionRun] = Field(default_factory=list)
    dense: list[DenseRecord] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    evaluations: list[EvaluationRecord] = Field(default_factory=list)
    dense_evaluations: list[EvaluationRecord] = Field(default_factory=list)
    distillations: list[DistillationReport] = Field(default_factory=list)

    @property
    def entries(self) -> int:
        """Number of weights of all pruned layers."""
        return sum(layer.entries for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of zeros of all pruned layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all pruned layers."""
        return self.zeros / self.entries if self.entries else 0.0

    @property
    def is_structured(self) -> bool:
        """True if whole structures were removed, and no single weights."""
        return self.method == STRUCTURED and self.sparsity < _SPARSE

    @property
    def kept(self) -> list[DenseRecord]:
        """Layers that would have been pruned without a rule that keeps them dense."""
        return [record for record in self.dense if record.rule is not None]

    @property
    def sparsity_with_kept(self) -> float:
        """Fraction of zeros among the weights of all pruned layers and of those that rules keep dense."""
        entries = self.entries + sum(record.entries for record in self.kept)
        return self.zeros / entries if entries else 0.0

    @property
    def mean_error(self) -> float | None:
        """Mean over layers of the relative reconstruction error; None if errors were not measured."""
        return _mean([layer.error for layer in self.layers])

    @property
    def mean_magnitude_error(self) -> float | None:
        """Mean over layers of the error that magnitude pruning leaves on the same inputs; None if not measured."""
        return _mean([layer.magnitude_error for layer in self.layers])

    def __repr__(self) -> str:
        """Summarise the run in a few lines, for notebooks."""
        lines = [
            f"RunReport of {self.architecture} '{self.model}': {self.method} {all_patterns(self)}",
            f"  {self.zeros:,} of {self.entries:,} weights are zero ({self.sparsity:.2%}) in {len(self.layers)} layers",
        ]
        if self.mean_error is not None and self.mean_magnitude_error is not None:
            lines.append(
                f"  mean relative error {self.mean_error:.4f}; magnitude pruning {self.mean_magnitude_error:.4f}"
            )
        for run in self.distillations:
            lines.append(
                f"  distilled in {run.steps} steps: KL to the dense model {run.kl_before:.4f} -> {run.kl_after:.4f}"
            )
        lines.append(f"  {self.seconds.get('total', 0.0):.1f} s; fields: {', '.join(type(self).model_fields)}")
        return "\n".join(lines)

    __str__ = __repr__

    def with_seconds(self, phase: str, seconds: float) -> RunReport:
        """Return a copy with the time of a phase added, also to the total."""
        times = dict(self.seconds)
        for name in (phase, "total"):
            times[name] = times.get(name, 0.0) + seconds
        return self.model_copy(update={"seconds": times})

    def to_json(self) -> str:
        """Return the report as JSON, with a summary at the beginning."""
        summary = {
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "entries": self.entries,
            "sparsity_with_kept": self.sparsity_with_kept,
            "mean_error": self.mean_error,
            "mean_magnitude_error": self.mean_magnitude_error,
        }
        return to_json({"summary": summary, **self.model_dump(mode="json")}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> RunReport | None:
        """Read the report of a pruned directory; return None if there is none.

        Raises:
            CheckpointError: when the file exists but is not a report.
        """
        path = folder / REPORT_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            data.pop("summary", None)
            return cls.model_validate(data)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, ValidationError):
            raise CheckpointError(f"'{path}' is not a report of this program: remove or replace it.") from None


def solve_record(info: SolveInfo) -> dict[str, Any]:
    """Convert the record of a solver to plain JSON values."""
    return {**asdict(info), "status": str(info.status)}


def all_patterns(report: RunReport) -> str:
    """Return the pattern of a run, followed by the patterns that rules give to some layers."""
    others = ", ".join(f"{pattern} for {rule}" for rule, pattern in report.overrides.items())
    return f"{report.pattern} but {others}" if others else report.pattern


def kept_sentence(report: RunReport) -> str:
    """Describe the layers that rules keep dense, and the sparsity that counts them, as a sentence without full stop."""
    rules = ", ".join(dict.fromkeys(record.rule for record in report.kept if record.rule is not None))
    entries = sum(record.entries for record in report.kept)
    return (
        f"{len(report.kept)} more with {entries:,} weights are kept dense by rules ({rules}); with them "
        f"{100 * report.sparsity_with_kept:.2f} % are zero"
    )


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured and len(measured) == len(values) else None
