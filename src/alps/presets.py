"""What one word asks for: the steps of a run beside its method, where nothing else is said."""

from __future__ import annotations

from typing import Any

from alps.errors import check_known

PAPER = "paper"

# docs/presets.md has the measurements behind them.
PRESETS: dict[str, dict[str, Any]] = {
    PAPER: {"order": "block", "target": "pruned", "match": 0, "budget": "uniform"},
    "fast": {"order": "sequential", "target": 0.4, "match": 0, "budget": "uniform"},
    "best": {"order": "sequential", "target": 0.4, "match": 1, "budget": "loss"},
}


def preset_steps(name: Any, semi_structured: bool) -> dict[str, Any]:
    """`order`, `target`, `match` and `budget` of a preset, as in `alps.config.PruneSettings`.

    Args:
        name: what a user wrote.
        semi_structured: of N:M, which fixes the share of zeros of every group and leaves a budget nothing to move.

    Raises:
        ConfigError: for anything but a name of `PRESETS`.
    """
    check_known("Preset", name, PRESETS)
    return {**PRESETS[name], **({"budget": "uniform"} if semi_structured else {})}
