"""Charts of the page: lines at the perplexities, phases counted once."""

from __future__ import annotations

import math
import re
import statistics

import pytest

from alps.reporting.compare_results import Result
from alps.reporting.html_charts import split_seconds
from alps.reporting.svg import format_number
from helpers.html_page import pictures


def test_lines_are_at_the_perplexities(results: list[Result], text: str) -> None:
    (drawing, _) = pictures(text, "Perplexity on wikitext2.")[:2]
    for place, method in enumerate(("wanda", "alps", "best")):
        found = re.findall(rf'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--s{place}\)', drawing)
        means = [
            statistics.mean(r.evaluations[0].perplexity for r in results if (r.method, r.pattern) == (method, p))
            for p in ("0.5", "0.6", "0.7", "0.8")
        ]
        points = sorted({(float(x), float(y)) for x, y in found})
        # The ends of the bars are drawn like points, above and below those of the means.
        heights = {x: sorted(y for other, y in points if other == x) for x, _ in points}
        middles = [ys[len(ys) // 2] for _, ys in sorted(heights.items())]
        assert len(middles) == 4
        logs = [math.log(mean) for mean in means]
        slope = (middles[3] - middles[0]) / (logs[3] - logs[0])
        for middle, log in zip(middles, logs, strict=True):
            assert middle == pytest.approx(middles[0] + slope * (log - logs[0]), abs=0.1)
            assert slope < 0, "larger is higher"
    assert f"alps: {format_number(means_of(results, 'alps', '0.5'))} at 0.5" in drawing and "Dense: 24.5." in drawing


def means_of(results: list[Result], method: str, pattern: str) -> float:
    return statistics.mean(r.evaluations[0].perplexity for r in results if (r.method, r.pattern) == (method, pattern))


def test_phases_are_counted_once() -> None:
    seconds = {"load": 2.0, "forward": 9.5, "gram": 4.0, "solve": 20.0, "admm": 14.5, "refit": 1.0, "total": 36.0}
    found = split_seconds(seconds)
    assert found == {"load": 2.0, "forward": 9.5, "gram": 4.0, "solve": 4.5, "admm": 14.5, "refit": 1.0, "other": 0.5}
    assert sum(split_seconds({"solve": 3.0, "sweep": 2.0}).values()) == 3.0
