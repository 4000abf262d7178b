"""JSON that every parser reads, and its single place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from alps.core.json_text import to_json

_SOURCE = Path(__file__).parent.parent.parent / "src" / "alps"
# Texts that are hashed, and neither written nor printed.
_HASHED = {"models/fingerprint.py"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": [number]})


def test_layout_and_values_pass_through() -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {}}
    assert json.loads(to_json(value)) == value
    assert to_json(value, indent=1, sort_keys=True) == json.dumps(value, indent=1, sort_keys=True)


def test_no_other_module_makes_json() -> None:
    makers = {
        str(path.relative_to(_SOURCE))
        for path in _SOURCE.rglob("*.py")
        if re.search(r"json\.dumps?\(|from json import", path.read_text())
    }
    assert makers == {"core/json_text.py"} | _HASHED
