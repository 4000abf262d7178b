"""Records of calibration windows, and unknown keys in any record."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from alps.data.windows import Windows
from alps.reporting.records import CalibrationRecord, Estimate, calibration_record


def test_windows_are_described_with_their_sources() -> None:
    windows = Windows(torch.arange(12).view(3, 4), "mix", 12)
    record = calibration_record(windows, 7)
    assert (record.source, record.windows, record.seqlen, record.tokens, record.seed) == ("mix", 3, 4, 12, 7)
    assert record.sha256 == windows.sha256 and len(record.sha256) == 64
    assert [(part.source, part.windows) for part in record.parts] == [("mix", 3)]
    mixed = Windows(torch.arange(12).view(3, 4), "mix", 12, parts=(("a", 2), ("b", 1)))
    parts = calibration_record(mixed, None).parts
    assert [(part.source, part.windows) for part in parts] == [("a", 2), ("b", 1)]


def test_unknown_keys_are_refused() -> None:
    assert Estimate.model_validate({"value": 0.5, "stderr": None}).stderr is None
    with pytest.raises(ValidationError):
        Estimate.model_validate({"value": 0.5, "stderr": None, "error": 0.1})
    with pytest.raises(ValidationError):
        CalibrationRecord.model_validate({"source": "x"})
