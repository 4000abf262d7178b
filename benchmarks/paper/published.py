"""The figures that the paper published for whole models, printed beside those of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from alps.core.yaml_io import read_yaml
from alps.reporting.compare_results import DENSE, Result, mean_std
from alps.reporting.markdown_tables import summary
from layers import markdown
from paper.recipe import Strict

PUBLISHED = Path(__file__).parent / "published.yaml"


class Figures(Strict):
    """Everything in `published.yaml`.

    Attributes:
        columns: names of texts and tasks.
        models: by model, pattern and method, a figure a column: perplexity, or accuracy in per cent.
    """

    columns: list[str]
    models: dict[str, dict[str, dict[str, list[float | None]]]]

    @model_validator(mode="after")
    def _a_figure_a_column(self) -> Figures:
        for name, patterns in self.models.items():
            for pattern, methods in patterns.items():
                for method, row in methods.items():
                    if len(row) != len(self.columns):
                        raise ValueError(f"{name}, {pattern}, {method} has {len(row)} figures")
        return self

    def figure(self, result: Result, column: str) -> float | None:
        """The paper's figure for a run; None where it has none."""
        row = self.models.get(result.model, {}).get(result.pattern, {}).get(result.method)
        return row[self.columns.index(column)] if row and column in self.columns else None


def beside_the_paper(results: Sequence[Result]) -> str:
    """The summary of a comparison, then a table a pattern with the paper's figures, where it has any."""
    figures = Figures.model_validate(read_yaml(PUBLISHED))
    pruned = [result for result in results if result.method != DENSE]
    parts = [summary(results)]
    for pattern in dict.fromkeys(result.pattern for result in pruned):
        parts += _table(figures, [result for result in pruned if result.pattern == pattern])
    if len(parts) == 1:
        parts.append(f"Beside the paper: it has nothing for {results[0].model} at these patterns and on these texts.")
    return "\n".join(parts)


def _table(figures: Figures, results: Sequence[Result]) -> list[str]:
    """One pattern; empty where the paper has nothing."""
    measured = _means(results)
    columns = [name for name in figures.columns if any(name in row for row in measured.values())]
    paper = {result.method: {name: figures.figure(result, name) for name in columns} for result in results}
    if not any(figure is not None for row in paper.values() for figure in row.values()):
        return []
    rows = []
    for method, row in measured.items():
        rows.append([f"{method}, measured", *(_cell(row.get(name)) for name in columns)])
        rows.append([f"{method}, paper", *(_cell(paper[method][name]) for name in columns)])
    for title, found in (("measured", measured), ("paper", paper)):
        if {"alps", "sparsegpt"} <= set(found):
            ratios = [_ratio(found["alps"].get(name), found["sparsegpt"].get(name)) for name in columns]
            rows.append([f"ALPS / SparseGPT, {title}", *ratios])
    return [f"## Beside the paper: {results[0].pattern}\n", markdown(["", *columns], rows) + "\n"]


def _means(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """By method, mean perplexities by text and mean accuracies, in per cent, by task."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        row = found.setdefault(result.method, {})
        for record in result.evaluations:
            # A local copy of WikiText-2 is called wikitext2:FILE.
            row.setdefault(record.text.partition(":")[0], []).append(record.perplexity)
        for task in result.tasks:
            if "acc" in task.metrics:
                row.setdefault(task.task, []).append(100 * task.metrics["acc"].value)
    return {method: {name: mean_std(values).mean for name, values in row.items()} for method, row in found.items()}


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.3f}"


def _cell(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"
