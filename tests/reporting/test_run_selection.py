"""Runs of a comparison: their order, and what a page shows first."""

from __future__ import annotations

from alps.reporting.compare_results import Result
from alps.reporting.run_selection import Runs
from helpers.comparisons import comparison


def test_methods_patterns_and_seeds_have_an_order(results: list[Result]) -> None:
    runs = Runs(results)
    assert runs.dense is results[0] and runs.pruned == results[1:]
    assert runs.methods == ["wanda", "alps", "best"] and runs.seeds == [0, 1]
    assert runs.ratios == ["0.5", "0.6", "0.7", "0.8"] and runs.groups == ["2:4", "4:8"]
    assert runs.patterns == ["0.7", "0.5", "0.6", "0.8", "2:4", "4:8"], "the middle one is in front"


def test_runs_are_selected_by_method_and_pattern(results: list[Result]) -> None:
    runs = Runs(results)
    assert [(r.method, r.pattern, r.seed) for r in runs.select("alps", "2:4")] == [
        ("alps", "2:4", 0),
        ("alps", "2:4", 1),
    ]
    firsts = [(r.method, r.seed) for r in runs.first_seeds("0.6")]
    assert firsts == [("wanda", 0), ("alps", 0), ("best", 0)] and runs.first_seeds("0.9") == []


def test_a_comparison_may_have_groups_alone_and_no_dense_model() -> None:
    runs = Runs([r for r in comparison(["wanda"], ["4:8", "2:4"], 1, 1, []) if r.method == "wanda"])
    assert runs.dense is None and runs.ratios == [] and runs.patterns == runs.groups == ["4:8", "2:4"]
