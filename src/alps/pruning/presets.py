"""What one word asks for: the steps of a run beside its method, where nothing else is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alps.core.errors import check_choice
from alps.finetuning.block_reconstruction import DEFAULT_RECONSTRUCT_TARGET

PAPER = "paper"

_PLAIN = {
    "target": "pruned",
    "match": 0,
    "match_target": DEFAULT_RECONSTRUCT_TARGET,
    "budget": "uniform",
    "channels": "equal",
}
# docs/presets.md has the measurements behind them.
PRESETS: dict[str, dict[str, Any]] = {
    PAPER: {"order": "block", **_PLAIN},
    "fast": {**_PLAIN, "order": "sequential", "target": 0.4},
    "best": {
        "order": "sequential",
        "target": 0.1,
        "match": 1,
        "match_target": 0.1,
        "budget": "sensitivity",
        "channels": "block-output",
    },
}


def apply_preset(given: Mapping[str, Any], semi_structured: bool, by_rows: bool) -> dict[str, Any]:
    """What is given, and for the rest of the steps what its `preset` says.

    Args:
        given: settings by name, as in `alps.pruning.config.PruneConfig`, without those that were not said.
        semi_structured: of N:M, which fixes the share of zeros of every group and leaves a budget nothing to move.
        by_rows: of a method that prunes every row alike; like N:M it has no use for what channels count.

    Raises:
        ConfigError: for a preset that is no name of `PRESETS`.
    """
    name = given.get("preset", PAPER)
    check_choice("Preset", name, PRESETS)
    steps = dict(PRESETS[name])
    if semi_structured:
        steps["budget"] = "uniform"
    if semi_structured or by_rows:
        steps["channels"] = "equal"
    if given.get("match") == 0:
        steps["match_target"] = DEFAULT_RECONSTRUCT_TARGET
    return {**steps, **given}
