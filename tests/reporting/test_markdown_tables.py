"""Tables of results: means over seeds, the best in bold, accuracies with their errors."""

from __future__ import annotations

import math

from alps.reporting.markdown_tables import summary
from alps.reporting.records import Estimate, TaskRecord
from helpers.comparisons import measured_result


def test_the_table_has_means_over_seeds_and_the_best_in_bold() -> None:
    rows = [measured_result("dense", "", None, 9.0)]
    rows += [
        measured_result("a", seed=0, perplexity=20.0),
        measured_result("a", seed=1, perplexity=22.0),
        measured_result("b", perplexity=30.0),
    ]
    rows += [measured_result("b", "2:4", perplexity=40.0)]
    lines = summary(rows).splitlines()
    start = lines.index("## Perplexity on t (dense 9.00)")
    assert lines[start + 2 : start + 6] == [
        "| | 0.5 | 2:4 |",
        "|---|---:|---:|",
        "| a | **21.0 ± 1.4** |  |",
        "| b | 30.0 | 40.0 |",
    ]
    assert "| a | **0.210 ± 0.014** |  |" in lines and "Mean relative" not in summary(rows)


def test_the_table_has_accuracies_in_per_cent_with_their_errors() -> None:
    def scored(value: float) -> list[TaskRecord]:
        metrics = {"acc_norm": Estimate(value=0.9, stderr=0.1), "acc": Estimate(value=value, stderr=0.02)}
        return [TaskRecord(model="m", task="piqa", metrics=metrics, items=50, num_fewshot=0, lm_eval="0")]

    rows = [
        measured_result("dense", "", None, tasks=scored(0.7)),
        measured_result("a", tasks=scored(0.5)),
        measured_result("b", tasks=scored(0.6)),
    ]
    lines = summary(rows).splitlines()
    start = lines.index("## piqa, per cent on 50 items (dense 70.0)")
    assert lines[start + 4 : start + 6] == ["| a | 50.0 ± 2.0 |", "| b | **60.0 ± 2.0** |"]


def test_a_loss_beyond_every_perplexity_is_shown_as_a_loss() -> None:
    rows = [measured_result("dense", "", None, math.inf), measured_result("a", perplexity=math.inf)]
    lines = summary([*rows, measured_result("b", perplexity=30.0)]).splitlines()
    start = lines.index("## Perplexity on t (dense loss 1.0)")
    assert lines[start + 4 : start + 6] == ["| a |  |", "| b | 30.0 |"]
    start = lines.index("## Loss on t, nats")
    assert lines[start + 4 : start + 6] == ["| a | **1.0** |", "| b | **1.0** |"]
    only = summary(rows)
    assert "## Loss on t, nats" in only and "## Perplexity" not in only
