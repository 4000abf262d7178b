"""The record of a run: what was pruned, how well, at what cost, and on which inputs. Becomes `report.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from alps.core.errors import CheckpointError
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
# Phases that are parts of `solve`.
INSIDE_SOLVE = ("sweep", "select", "swap", "admm", "refit")


class LayerRecord(Record):
    """One site.

    Attributes:
        name, block, kind: dotted name, index of its block, last part of the name.
        shape: (out, in).
        entries, zeros: weights of the site, and how many of them are zero as written.
        error: relative reconstruction error of the weights as written, in the checkpoint's dtype; None when the
            run did not collect the Gram.
        magnitude_error: the same for magnitude pruning of this site on the same inputs.
        expert: number of the expert whose map it is, in a mixture that keeps those of all experts in one parameter.
        tokens: calibration tokens that it received; None when none were fed.
        pooled_tokens: average tokens of a pool that filled up the statistics of an expert that received too few, see
            `alps.calibration.moe_statistics`.
        pattern: what the site was pruned to; None where that was not noted.
        zeros_before: weights that were zero before, where the run was to keep such zeros; else None.
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
    """A parameter with two or more dimensions, or an expert's slice of one, that was left dense.

    Attributes:
        name, shape: of the parameter, or of the slice as (out, in).
        reason: why.
        rule: the rule of `keep_dense` which keeps it; None for what could not have been pruned either.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    rule: str | None = None

    @property
    def entries(self) -> int:
        """Weights of it."""
        return math.prod(self.shape)


class RunReport(Record):
    """Everything about one pruning run.

    Attributes:
        model: name as given by the user; architecture: its class.
        method, pattern: what was asked for.
        overrides: by rule, the patterns of sites that have another one, see `alps.pruning.layer_rules`.
        calibration: None for a method that reads no inputs.
        layers, dense: what was pruned, and what was not with the reason. Sparsity, zeros, entries and errors are those
            of the pruned sites alone.
        reconstructions: of every block: those of the run itself, then those of `reconstruction_runs`, in order.
        reconstruction_runs: block matchings of the pruned checkpoint since, in order, each with its own calibration.
        seconds: wall time by phase: load, budget, capture, forward (all passes of every block), gram, prepare, solve
            (`INSIDE_SOLVE` are parts of it), errors, match, keep (blocks for the journal), write, save, total.
        peak_host_bytes: largest resident size of the process; peak_device_bytes: of torch on a GPU.
        versions: packages, machine, commit.
        notes: what else is to be known of the run, in sentences.
        evaluations: perplexities measured in the same run, dense and pruned, if any.
        distillations: those since, in order. Everything else is as the one-shot run left it: the zeros still hold, the
            errors are those of the weights before.
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
    distillations: list[DistillationReport] = Field(default_factory=list)

    @property
    def entries(self) -> int:
        """Weights of all sites."""
        return sum(site.entries for site in self.layers)

    @property
    def zeros(self) -> int:
        """Zeros of all sites."""
        return sum(site.zeros for site in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all sites."""
        return self.zeros / self.entries if self.entries else 0.0

    @property
    def kept(self) -> list[DenseRecord]:
        """What rules keep dense that would have been pruned."""
        return [row for row in self.dense if row.rule is not None]

    @property
    def sparsity_with_kept(self) -> float:
        """The same with what rules keep dense counted among the weights, as dense."""
        entries = self.entries + sum(row.entries for row in self.kept)
        return self.zeros / entries if entries else 0.0

    @property
    def mean_error(self) -> float | None:
        """Mean over sites of the relative reconstruction error; None when errors were not measured."""
        return _mean([site.error for site in self.layers])

    @property
    def mean_magnitude_error(self) -> float | None:
        """Mean over sites of what magnitude pruning would have left on the same inputs."""
        return _mean([site.magnitude_error for site in self.layers])

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
            "sparsity_with_kept": self.sparsity_with_kept,
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
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, ValidationError):
            raise CheckpointError(f"'{path}' is not a report of this program: remove or replace it.") from None


def solve_record(info: SolveInfo) -> dict[str, Any]:
    """A solver's record as plain JSON values."""
    return {**asdict(info), "status": str(info.status)}


def all_patterns(report: RunReport) -> str:
    """The pattern asked for, and those that rules give to some layers in its place."""
    others = ", ".join(f"{pattern} for {rule}" for rule, pattern in report.overrides.items())
    return f"{report.pattern} but {others}" if others else report.pattern


def kept_sentence(report: RunReport) -> str:
    """What rules keep dense, and the share of zeros when it is counted, too; without a full stop."""
    rules = ", ".join(dict.fromkeys(row.rule for row in report.kept if row.rule is not None))
    entries = sum(row.entries for row in report.kept)
    return (
        f"{len(report.kept)} more with {entries:,} weights are kept dense by rules ({rules}); with them "
        f"{100 * report.sparsity_with_kept:.2f} % are zero"
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
