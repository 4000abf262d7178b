"""Report of a structured pruning run: read as it was written, and refused when it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from alps.core.errors import CheckpointError
from alps.reporting.shrink_report import SHRINK_REPORT_NAME, ShrinkReport
from helpers.shrink_reports import shrink_report


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = shrink_report()
    assert ShrinkReport.read(tmp_path) is None
    (tmp_path / SHRINK_REPORT_NAME).write_text(report.to_json())
    assert ShrinkReport.read(tmp_path) == report
    assert report.share_removed == pytest.approx(0.25)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "m"}', "[" * 100_000, "\ufffe"])
def test_anything_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / SHRINK_REPORT_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"shrink\.json' is not a report of this program"):
        ShrinkReport.read(tmp_path)


def test_a_report_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / SHRINK_REPORT_NAME).write_bytes(shrink_report().to_json().encode("utf-16"))
    with pytest.raises(CheckpointError, match="is not a report"):
        ShrinkReport.read(tmp_path)
