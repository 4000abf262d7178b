"""Tables of results with a row per method and a column per pattern, the best of a column marked.

This module writes the tables as Markdown, and `alps.reporting.html_report` as HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alps.reporting.compare_results import DENSE, Result, mean_std
from alps.reporting.records import ComparisonRecord, Estimate

TABLE_NAME = "table.md"
Figure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Cell:
    """Text of a value, empty if there is none; `best` marks the best value of a column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Values of one measure for every method (rows) and pattern (columns)."""

    title: str
    patterns: list[str]
    rows: list[tuple[str, list[Cell]]]


def summary(results: Sequence[Result]) -> str:
    """Write all measurements as Markdown: the conditions first, then a table per measure."""
    parts = [_conditions(results), *map(_markdown, tables(results))]
    return "\n\n".join(parts) + "\n"


def tables(results: Sequence[Result]) -> list[Table]:
    """Make a table per measure, with means and standard deviations over seeds.

    Accuracies, agreements and their standard errors are in per cent. For several seeds the standard deviation replaces
    the standard error.
    """
    pruned = [result for result in results if result.method != DENSE]
    dense = next((result for result in results if result.method == DENSE), None)
    measures = []
    first = (dense or pruned[0]).evaluations
    for i, record in enumerate(first):
        note = f" (dense {record.perplexity_text('.2f')})" if dense else ""
        measures.append(_table(f"Perplexity on {record.text}{note}", pruned, _perplexity(i), ".1f", min))
        if any(i < len(r.evaluations) and math.isinf(r.evaluations[i].perplexity) for r in results):
            measures.append(_table(f"Loss on {record.text}, nats", pruned, _loss(i), ".1f", min))
        measures.append(
            _table(f"KL divergence from the dense model on {record.text}, nats", pruned, _kl(i), ".3f", min)
        )
        title = f"Agreement with the dense model's most likely token on {record.text}, per cent"
        measures.append(_table(title, pruned, _agreement(i), ".1f", max))
    for i, task in enumerate((dense or pruned[0]).tasks):
        note = f" (dense {100 * _score(dense, i).value:.1f})" if dense else ""
        title = f"{task.task}, per cent on {task.items or 'all'} items{note}"
        measures.append(_table(title, pruned, _task(i), ".1f", max, _task_error(i)))
    measures.append(_table("Mean relative reconstruction error", pruned, lambda r: r.mean_error, ".4f", min))
    measures.append(_table("Seconds to prune", pruned, lambda r: r.seconds.get("total"), ".1f", None))
    return [table for table in measures if any(cell.text for _, cells in table.rows for cell in cells)]


def _markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", f"| | {' | '.join(table.patterns)} |", "|---|" + "---:|" * len(table.patterns)]
    for method, cells in table.rows:
        lines.append(f"| {method} | {' | '.join(f'**{c.text}**' if c.best else c.text for c in cells)} |")
    return "\n".join(lines)


def _conditions(results: Sequence[Result]) -> str:
    first = results[0]
    used = next((r.calibration for r in results if r.calibration), None)
    texts = "; ".join(f"{e.text}: {e.windows} windows of {e.seqlen} tokens" for e in first.evaluations)
    seeds = sorted({r.seed for r in results if r.seed is not None})
    begun = ", each begun with BOS" if used and used.bos else ""
    drawn = begun + f"; seeds {', '.join(map(str, seeds))}" if seeds else begun
    lines = [
        f"# {first.model}",
        f"{first.architecture}, {first.dtype}, weights sha256 {(first.model_sha256 or 'unknown')[:12]}.",
        f"Calibrated on {used.source}: {used.windows} windows of {used.seqlen} tokens{drawn}." if used else "",
        f"Measured on {texts}." if texts else "",
        ", ".join(f"{name} {value}" for name, value in first.versions.items()) + ".",
    ]
    return "\n\n".join(line for line in lines if line)


def _table(
    title: str,
    results: Sequence[Result],
    figure: Figure,
    form: str,
    best: Callable[[Sequence[float]], float] | None,
    error: Figure | None = None,
) -> Table:
    patterns = list(dict.fromkeys(result.pattern for result in results))
    methods = list(dict.fromkeys(result.method for result in results))
    by_key = {(m, p): _values(results, m, p, figure) for m in methods for p in patterns}
    rows = []
    for method in methods:
        cells = []
        for pattern in patterns:
            values = by_key[method, pattern]
            means = [sum(v) / len(v) for (_, p), v in by_key.items() if p == pattern and v]
            errors = [] if error is None else _values(results, method, pattern, error)
            is_best = best is not None and len(means) > 1 and bool(values) and sum(values) / len(values) == best(means)
            cells.append(Cell(_text(values, form, errors), is_best))
        rows.append((method, cells))
    return Table(title, patterns, rows)


def _values(results: Sequence[Result], method: str, pattern: str, figure: Figure) -> list[float]:
    rows = [result for result in results if (result.method, result.pattern) == (method, pattern)]
    return [value for value in map(figure, rows) if value is not None]


def _text(values: Sequence[float], form: str, errors: Sequence[float]) -> str:
    if not values:
        return ""
    if sum(values) / len(values) >= 1000:
        form = ",.0f" if sum(values) / len(values) < 1e9 else ".2e"
    if len(values) == 1 and errors:
        return f"{values[0]:{form}} ± {errors[0]:{form}}"
    return mean_std(values).text(form)


def _perplexity(i: int) -> Figure:
    def perplexity(result: Result) -> float | None:
        value = result.evaluations[i].perplexity if i < len(result.evaluations) else math.inf
        return value if math.isfinite(value) else None

    return perplexity


def _loss(i: int) -> Figure:
    return lambda result: result.evaluations[i].loss if i < len(result.evaluations) else None


def _kl(i: int) -> Figure:
    def kl(result: Result) -> float | None:
        record = result.evaluations[i] if i < len(result.evaluations) else None
        return record.kl if isinstance(record, ComparisonRecord) and math.isfinite(record.kl) else None

    return kl


def _agreement(i: int) -> Figure:
    def agreement(result: Result) -> float | None:
        record = result.evaluations[i] if i < len(result.evaluations) else None
        return 100 * record.agreement if isinstance(record, ComparisonRecord) else None

    return agreement


def _task(i: int) -> Figure:
    return lambda result: 100 * _score(result, i).value if i < len(result.tasks) else None


def _task_error(i: int) -> Figure:
    def error(result: Result) -> float | None:
        stderr = _score(result, i).stderr if i < len(result.tasks) else None
        return None if stderr is None else 100 * stderr

    return error


def _score(result: Result, i: int) -> Estimate:
    """Return the accuracy on a task, else the first metric."""
    metrics = result.tasks[i].metrics
    return metrics.get("acc") or next(iter(metrics.values()))
