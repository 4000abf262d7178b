"""Traces of the page: the restart, and the quantity that Theorem 1 bounds."""

from __future__ import annotations

import re

from alps.reporting.compare_results import Result
from alps.reporting.svg import format_number
from helpers.html_page import pictures


def test_traces_show_the_restart_and_the_bound(results: list[Result], text: str) -> None:
    (result,) = [r for r in results if (r.method, r.pattern, r.seed) == ("alps", "0.7", 0)]
    traced = [site for site in result.layers if site.trace]
    drawings = pictures(text, "ρ · ‖W − D‖ / ‖W‖, which Theorem 1 bounds. " + traced[0].name)
    assert len(drawings) >= 1
    for site in traced:
        first, last = site.trace[0], site.trace[-1]
        begin, end = (format_number(check.gap * check.rho) for check in (first, last))
        wanted = f"{site.name}: {begin} at iteration 3, {end} at 90."
        assert any(wanted in drawing for drawing in drawings)
    for title in ("Penalty ρ", "‖W − D‖ / ‖W‖: distance", "Entries of the support", "Relative error of D"):
        (drawing, *_) = [d for d in pictures(text, title) if traced[0].name in d]
        assert drawing.count("stroke-dasharray: 1.2,2.4") == 1, "one site has begun anew"
        lines = [d for d in re.findall(r'<path d="([^"]*)" clip-path', drawing) if d.count("L") > 20]
        assert sorted(line.count("M") for line in lines) == [1, 1, 2], "and its line is broken there"
