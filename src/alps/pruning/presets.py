"""Presets: named combinations of the settings that go beyond the method, used where a setting is not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alps.core.errors import check_choice
from alps.finetuning.reconstruction_parameters import DEFAULT_RECONSTRUCT_TARGET

PAPER = "paper"

_PLAIN = {
    "dense_target": 0.0,
    "reconstruct_epochs": 0,
    "reconstruct_target": DEFAULT_RECONSTRUCT_TARGET,
    "allocation": "uniform",
    "row_weights": "equal",
}
# docs/project/log/presets.md has the measurements behind them.
PRESETS: dict[str, dict[str, Any]] = {
    PAPER: {"true_sequential": False, **_PLAIN},
    "fast": {**_PLAIN, "true_sequential": True, "dense_target": 0.4},
    "best": {
        "true_sequential": True,
        "dense_target": 0.1,
        "reconstruct_epochs": 6,
        "reconstruct_target": 0.1,
        "allocation": "sensitivity",
        "row_weights": "block-output",
    },
}


def apply_preset(values: Mapping[str, Any], *, semi_structured: bool, by_rows: bool) -> dict[str, Any]:
    """Return the values with those of their `preset` added where a setting is missing.

    Args:
        values: settings by name, as in `alps.pruning.config.PruneConfig`; only those that were given.
        semi_structured: whether the pattern is N:M. It fixes the zeros of every group, so that neither allocation nor
            row weights can move any; a preset then leaves both out.
        by_rows: whether the method prunes every row to the same sparsity, so that row weights have no effect.

    Raises:
        ConfigError: for a preset that is not in `PRESETS`.
    """
    name = values.get("preset", PAPER)
    check_choice("Preset", name, PRESETS)
    defaults = dict(PRESETS[name])
    if semi_structured:
        defaults["allocation"] = "uniform"
    if semi_structured or by_rows:
        defaults["row_weights"] = "equal"
    if values.get("reconstruct_epochs") == 0:
        defaults["reconstruct_target"] = DEFAULT_RECONSTRUCT_TARGET
    return {**defaults, **values}
