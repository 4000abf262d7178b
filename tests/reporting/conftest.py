"""A comparison of made-up results, and its page, for all tests of a worker."""

from __future__ import annotations

import pytest

from alps.reporting.compare_results import Result
from alps.reporting.html_report import report_page
from helpers.comparisons import comparison


@pytest.fixture(scope="session")
def results() -> list[Result]:
    """Results of three methods, six patterns and two seeds."""
    return comparison()


@pytest.fixture(scope="session")
def text(results: list[Result]) -> str:
    """The page of these results."""
    return report_page(results)
