"""Draw the README's figure, perplexity against sparsity, from the tables of docs/project/benchmarks.md.

python benchmarks/figure.py docs/assets/perplexity.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

PAGE = Path(__file__).parent.parent / "docs" / "project" / "benchmarks.md"
SPARSITIES = (50, 60, 70, 80)
# Method in the table, label, colour.
LINES = (
    ("wanda", "Wanda", "#8c8c8c"),
    ("sparsegpt", "SparseGPT", "#b07d2b"),
    ("alps", "ALPS", "#3b7dd8"),
    ("best", "ALPS, preset best", "#0b3d91"),
)
TOP = 2000.0


def table_rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the first table whose header line starts with `header`.

    Raises:
        ValueError: The text has no such table.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(header)]
    if not starts:
        raise ValueError(f"No table starts with {header!r}.")
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *`") for cell in line.strip("|").split("|")])
    return rows


def read_figures(page: str) -> dict[str, list[float]]:
    """Read the perplexities on WikiText-2 at each of SPARSITIES: {method: values}, and the dense model's as "dense"."""
    rows = table_rows(page, "| method | 50 % | 60 % | 70 % | 80 % |")
    figures = {row[0]: [_first_text(cell) for cell in row[1:5]] for row in rows}
    best = {row[0]: _first_text(row[2]) for row in table_rows(page, "| | `paper` | `best` |")}
    figures["best"] = [best[f"{sparsity} %"] for sparsity in SPARSITIES]
    dense = re.search(r"dense\s+(\d+\.\d) /", page[page.index("## Five methods") :])
    assert dense is not None
    figures["dense"] = [float(dense[1])] * len(SPARSITIES)
    return figures


def _first_text(cell: str) -> float:
    """Return the perplexity on WikiText-2 of a cell that has those of two texts."""
    return float(cell.split(" / ")[0])


def draw(figures: dict[str, list[float]]) -> Figure:
    """Draw one line per method, with its perplexity at 70 % and its name at the end."""
    figure = Figure(figsize=(7.2, 3.3), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.axhline(figures["dense"][0], color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(50, figures["dense"][0] * 0.93, f"dense {figures['dense'][0]}", va="top", color="#444444")
    for method, label, colour in LINES:
        values = figures[method]
        shown = [(x, y) for x, y in zip(SPARSITIES, values, strict=True) if y <= TOP]
        axes.plot(*zip(*shown, strict=True), color=colour, marker="o", markersize=4, linewidth=2)
        x, y = shown[-1]
        axes.text(x + 0.7, y, label, va="center", color=colour, fontweight="bold")
        if x != 70:
            axes.text(70, values[2] * 1.13, f"{values[2]:.0f}", ha="center", color=colour, fontsize=8)
    axes.set(yscale="log", ylim=(20, TOP), xlim=(49, 91), xlabel="zeros in every linear layer, per cent")
    axes.set_ylabel("perplexity, WikiText-2 (log)")
    axes.set_xticks(SPARSITIES)
    ticks = (25, 50, 100, 200, 500, 1000)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    # Text stays text, and equal figures give equal bytes.
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "alps", "font.size": 9.5, "font.family": "sans-serif"}
    ):
        draw(read_figures(PAGE.read_text())).savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
