"""Lines that commands print about a report."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from alps.cli.tables import evaluation_table, prune_summary
from alps.reporting.html_charts import split_seconds
from alps.reporting.records import ComparisonRecord
from alps.reporting.run_report import RunReport
from helpers.comparisons import measured_result

# A run of two ranks, with the time that its main rank communicates.
_SECONDS = {
    "load": 1.5,
    "capture": 0.5,
    "forward": 22.5,
    "gram": 6.0,
    "prepare": 4.0,
    "solve": 83.5,
    "admm": 60.0,
    "refit": 18.0,
    "communication": 13.5,
    "measure_error": 2.0,
    "journal": 1.0,
    "save": 3.5,
    "total": 138.0,
}


def test_phases_of_several_ranks_add_up_to_the_total() -> None:
    report = RunReport(
        model="m",
        architecture="Any",
        method="alps",
        pattern="70%",
        dtype="float32",
        device="cpu",
        calibration=None,
        seconds=_SECONDS,
    )
    line = re.search(r"138 s \((.*?)\)", prune_summary(report, Path("out")).plain)
    assert line is not None
    phases = {name: float(seconds) for name, seconds in (part.split() for part in line[1].split(", "))}
    assert phases["communication"] == 13.5 and not {"admm", "refit", "total"} & phases.keys()
    assert sum(phases.values()) == pytest.approx(138.0)

    chart = split_seconds(_SECONDS)
    assert sum(chart.values()) == pytest.approx(138.0)
    assert (chart["communication"], chart["solve"], chart["other"]) == (13.5, 5.5, 0.0)


def test_a_loss_stands_for_a_perplexity_that_no_number_holds() -> None:
    rows = [measured_result("dense", "", None, math.inf).evaluations[0], measured_result("a").evaluations[0]]
    row = rows[1].model_copy(update={"perplexity": math.inf, "ratio": math.inf})
    console = Console(width=200, file=io.StringIO())
    console.print(evaluation_table([rows[0], row]))
    assert isinstance(console.file, io.StringIO)
    cells = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in cells[0]] == ["t", "1", "loss 1.0", "", "", "", ""]
    assert [cell.strip() for cell in cells[1]][2:5] == ["loss 1.0", "9.000", "too large"]


@pytest.mark.parametrize("name", ["t", "a-folder/with-a-long-name/wikitext2-test.txt"])
def test_a_terminal_of_80_columns_shows_names_and_figures_whole(name: str) -> None:
    row = measured_result("a").evaluations[0].model_copy(update={"text": name})
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_table([row]))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert "".join(line[0] for line in cells) == name
    assert isinstance(row, ComparisonRecord)
    assert cells[0][1:4] == [str(row.windows), row.perplexity_text(".3f"), f"{row.reference_perplexity:.3f}"]
    assert f"{row.model} against {row.reference} (KL in nats), windows of {row.seqlen} tokens" in printed
