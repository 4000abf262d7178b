"""Inspection of a checkpoint on disk: zeros per layer, violations of N:M patterns, and dense parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from alps.core.errors import CheckpointError
from alps.models.blocks import find_blocks
from alps.models.dense_parameters import dense_parameters
from alps.models.load import check_checkpoint, load_model
from alps.models.sites import Site
from alps.reporting.run_report import DenseRecord, RunReport
from alps.solvers.patterns import USUAL_PATTERNS, SemiStructured, group_violations, parse_pattern


class LayerZeros(BaseModel):
    """Zeros of one layer.

    Attributes:
        name, block, kind: dotted name, index of the block, last part of the name.
        shape: (out, in).
        zeros: number of zeros among the weights.
    """

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    zeros: int

    @property
    def entries(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class PatternCheck(BaseModel):
    """Result of counting the groups of an N:M pattern.

    Attributes:
        pattern: `2:4`, for example.
        groups: groups of consecutive inputs in all layers.
        violations: groups with more nonzero weights than the pattern keeps.
    """

    pattern: str
    groups: int
    violations: int


class Inspection(BaseModel):
    """Counts for one directory.

    Attributes:
        directory: as the user gave it.
        claimed: pattern of its report; None without a report.
        layers: zeros of every layer.
        dense: parameters without zeros, with the reason.
        checks: counts for every pattern that a report claims; without a report, N:M patterns that hold everywhere.
    """

    directory: str
    claimed: str | None
    layers: list[LayerZeros]
    dense: list[DenseRecord]
    checks: list[PatternCheck]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all layers."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.entries for layer in self.layers)

    def __repr__(self) -> str:
        """Summarise the counts in a few lines, for notebooks."""
        lines = [f"Inspection of '{self.directory}': {self.sparsity:.2%} zeros in {len(self.layers)} layers"]
        lines += [f"  {check.pattern}: {check.violations:,} of {check.groups:,} groups broken" for check in self.checks]
        return "\n".join([*lines, f"  {len(self.dense)} dense parameters"])

    __str__ = __repr__


def inspect(directory: str | Path) -> Inspection:
    """Count zeros and check groups in a checkpoint.

    A report inside the directory only states which patterns to check, and why parameters were left dense. Every number
    is counted from the weights.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: for a directory that is not a readable checkpoint.
    """
    directory = str(directory)
    check_checkpoint(directory)
    if not Path(directory).is_dir():
        raise CheckpointError(f"'{directory}' is not a directory: give the folder of a checkpoint.")
    report = RunReport.read(Path(directory))
    model = load_model(directory)
    blocks = find_blocks(model)
    patterns = {} if report is None else {layer.name: layer.pattern for layer in report.layers}
    counts: dict[SemiStructured, list[int]] = {}
    kept_dense = {} if report is None else {record.name: record for record in report.kept}
    # Layers that no setting prunes, such as those that a forward on text does not call.
    never = {} if report is None else {record.name: record for record in report.dense if record.rule is None}
    layers, unpruned = [], []
    for block in blocks:
        for site in block.sites:
            weight = site.read()
            zeros = int((weight == 0).sum())
            if not zeros and site.parameter_name in never:
                unpruned.append(never[site.parameter_name])
                continue
            layers.append(LayerZeros(name=site.name, block=block.index, kind=site.kind, shape=site.shape, zeros=zeros))
            kept = kept_dense.get(site.name, kept_dense.get(site.parameter_name))
            if not zeros:
                reason, rule = ("no zeros in it", None) if kept is None else (kept.reason, kept.rule)
                unpruned.append(DenseRecord(name=_dense_name(site), shape=site.shape, reason=reason, rule=rule))
            if kept is not None:
                continue
            for pattern in _patterns_to_check(site.name, report, patterns):
                groups, bad = group_violations(weight, pattern)
                count = counts.setdefault(pattern, [0, 0])
                count[0] += groups
                count[1] += bad
    elsewhere = dense_parameters(model, {site.parameter_name for block in blocks for site in block.sites})
    checks = [PatternCheck(pattern=str(p), groups=n, violations=bad) for p, (n, bad) in counts.items() if n]
    if report is None:
        checks = [check for check in checks if check.violations == 0]
    return Inspection(
        directory=directory,
        claimed=None if report is None else report.pattern,
        layers=layers,
        dense=[DenseRecord(name=d.name, shape=d.shape, reason=d.reason) for d in elsewhere] + unpruned,
        checks=checks,
    )


def _patterns_to_check(
    name: str, report: RunReport | None, patterns: Mapping[str, str | None]
) -> Sequence[SemiStructured]:
    """Return the N:M pattern that the report claims for a layer; without a report, the usual N:M patterns."""
    if report is None:
        return USUAL_PATTERNS
    pattern = parse_pattern(patterns.get(name) or report.pattern)
    return (pattern,) if isinstance(pattern, SemiStructured) else ()


def _dense_name(site: Site) -> str:
    return site.parameter_name if site.expert is None else site.name
