"""Results: what of a report they keep, and files of them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

import alps
from alps.core.errors import CheckpointError
from alps.reporting.compare_results import Result, mean_std, read_results, write_results
from alps.reporting.markdown_tables import summary
from alps.reporting.records import ComparisonRecord, Estimate, EvaluationRecord, TaskRecord


def result(method: str, pattern: str = "0.5", seed: int | None = 0, perplexity: float = 10.0, **more: Any) -> Result:
    record: dict[str, Any] = {"model": "m", "text": "t", "windows": 1, "seqlen": 9, "predicted_tokens": 8, "loss": 1.0}
    found: EvaluationRecord = EvaluationRecord(**record, perplexity=perplexity)
    if method != "dense":
        far: dict[str, Any] = {
            "reference": "d",
            "reference_perplexity": 9.0,
            "ratio": perplexity / 9,
            "kl": perplexity / 100,
        }
        found = ComparisonRecord(**record, perplexity=perplexity, agreement=0.5, **far)
    base = {"model": "m", "model_sha256": "ab" * 32, "architecture": "A", "dtype": "float32", "device": "cpu"}
    return Result(**{**base, "method": method, "pattern": pattern, "seed": seed, "evaluations": [found], **more})


def test_a_result_keeps_the_traces_of_the_best_the_middle_and_the_worst_site(
    stories: Path, english_file: Path, tmp_path: Path
) -> None:
    report = alps.prune(
        str(stories), sparsity=0.7, calibration=str(english_file), samples=4, seqlen=32, out=tmp_path / "out"
    )
    kept = Result.from_report(report, "mine", seed=3)
    assert (kept.method, kept.seed, kept.pattern, kept.model_sha256) == ("mine", 3, "70%", None)
    # Of five blocks the first, the middle and the last note their errors.
    followed = [site for site in report.layers if site.block in (0, 2, 4)]
    assert {site.block for site in report.layers if site.solve["trace"][0]["error"] is not None} == {0, 2, 4}
    by_error = sorted(followed, key=lambda site: site.error or 0)
    wanted = {by_error[0].name, by_error[10].name, by_error[20].name}
    assert {site.name for site in kept.layers if site.trace} == wanted and len(kept.layers) == 35
    worst = next(site for site in kept.layers if site.name == by_error[20].name)
    assert [point.model_dump() for point in worst.trace] == by_error[20].solve["trace"]
    assert (worst.error, worst.zeros) == (by_error[20].error, by_error[20].zeros)
    assert kept.sparsity == report.sparsity and kept.seconds == report.seconds


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [result("dense", "", None), result("wanda", perplexity=0.1 + 0.2)]
    write_results(path, rows)
    found = read_results(path)
    assert found == rows and isinstance(found[1].evaluations[0], ComparisonRecord)
    assert type(found[0].evaluations[0]) is EvaluationRecord
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    assert read_results(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text() + '{"model": 3}\n')
    with pytest.raises(CheckpointError, match="line 3: not a result"):
        read_results(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_results(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_results(tmp_path / "no" / "r.jsonl", rows)


def test_spread() -> None:
    values = [3.0, 5.0, 10.0]
    found = mean_std(values)
    assert found.mean == 6 and found.deviation == pytest.approx(statistics.stdev(values))
    assert found.text(".1f") == "6.0 ± 3.6" and mean_std([2.25]).text(".1f") == "2.2"
    assert mean_std([1.0, math.inf]).deviation == math.inf


def test_the_table_has_means_over_seeds_and_the_best_in_bold() -> None:
    rows = [result("dense", "", None, 9.0)]
    rows += [result("a", seed=0, perplexity=20.0), result("a", seed=1, perplexity=22.0), result("b", perplexity=30.0)]
    rows += [result("b", "2:4", perplexity=40.0)]
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
        result("dense", "", None, tasks=scored(0.7)),
        result("a", tasks=scored(0.5)),
        result("b", tasks=scored(0.6)),
    ]
    lines = summary(rows).splitlines()
    start = lines.index("## piqa, per cent on 50 items (dense 70.0)")
    assert lines[start + 4 : start + 6] == ["| a | 50.0 ± 2.0 |", "| b | **60.0 ± 2.0** |"]
