"""What a directory on disk really holds: zeros by site, whether groups obey a pattern, and what stayed dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from alps.core.errors import CheckpointError
from alps.models.blocks import dense_parameters, find_blocks
from alps.models.load import check_model_path, load_model
from alps.models.sites import Site
from alps.reporting.run_report import DenseRecord, RunReport
from alps.solvers.patterns import USUAL_PATTERNS, SemiStructured, group_violations, parse_pattern


class LayerZeros(BaseModel):
    """Zeros of one site."""

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    zeros: int

    @property
    def entries(self) -> int:
        """Weights of the site."""
        return self.shape[0] * self.shape[1]


class PatternCheck(BaseModel):
    """Groups of consecutive inputs, and how many of them hold more nonzero weights than the pattern keeps."""

    pattern: str
    groups: int
    violations: int


class Inspection(BaseModel):
    """The findings for one directory; `claimed` is the pattern of its report, when it has one."""

    directory: str
    claimed: str | None
    layers: list[LayerZeros]
    dense: list[DenseRecord]
    checks: list[PatternCheck]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all sites."""
        return sum(site.zeros for site in self.layers) / sum(site.entries for site in self.layers)


def inspect(directory: str) -> Inspection:
    """Count zeros and check groups in a checkpoint.

    A report inside the directory only says which pattern to check and why parameters were left dense; every number
    is counted from the weights.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: when it is not a readable checkpoint of a causal model.
    """
    check_model_path(directory)
    if not Path(directory).is_dir():
        raise CheckpointError(f"'{directory}' is not a directory: give the folder of a checkpoint.")
    report = RunReport.read(Path(directory))
    model = load_model(directory)
    blocks = find_blocks(model)
    patterns = {} if report is None else {site.name: site.pattern for site in report.layers}
    counts: dict[SemiStructured, list[int]] = {}
    ruled = {} if report is None else {row.name: row for row in report.kept}
    sites, unpruned = [], []
    for block in blocks:
        for site in block.sites:
            weight = site.read()
            zeros = int((weight == 0).sum())
            sites.append(LayerZeros(name=site.name, block=block.index, kind=site.kind, shape=site.shape, zeros=zeros))
            kept = ruled.get(site.name, ruled.get(site.parameter_name))
            if not zeros:
                reason, rule = ("no zeros in it", None) if kept is None else (kept.reason, kept.rule)
                unpruned.append(DenseRecord(name=_label(site), shape=site.shape, reason=reason, rule=rule))
            if kept is not None:
                continue
            for pattern in _claimed(site.name, report, patterns):
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
        layers=sites,
        dense=[DenseRecord(name=d.name, shape=d.shape, reason=d.reason) for d in elsewhere] + unpruned,
        checks=checks,
    )


def _claimed(name: str, report: RunReport | None, patterns: Mapping[str, str | None]) -> Sequence[SemiStructured]:
    """N:M patterns that a site is said to have by its own record or the run's, or may have where nothing is said."""
    if report is None:
        return USUAL_PATTERNS
    pattern = parse_pattern(patterns.get(name) or report.pattern)
    return (pattern,) if isinstance(pattern, SemiStructured) else ()


def _label(site: Site) -> str:
    return site.parameter_name if site.expert is None else site.name
