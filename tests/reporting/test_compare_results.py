"""Results: what of a report they keep, and files of them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

import alps
from alps.core.errors import CheckpointError
from alps.reporting.compare_results import Result, mean_std, read_results, write_results
from alps.reporting.records import ComparisonRecord, EvaluationRecord
from helpers.comparisons import measured_result


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
    rows = [measured_result("dense", "", None), measured_result("wanda", perplexity=0.1 + 0.2)]
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
