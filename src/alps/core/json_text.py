"""JSON text of everything that is written or printed: strict, so that every parser reads it."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any, **layout: Any) -> str:
    """Return a value as JSON, which has no NaN and no infinity.

    Args:
        value: of plain Python types.
        layout: as in `json.dumps`, such as `indent`.

    Raises:
        ValueError: for a NaN or an infinity, which the caller has to refuse or replace before.
    """
    return json.dumps(value, allow_nan=False, **layout)
