"""Model card of a shrunk checkpoint: figures of the report, front matter for hubs, no folders of the user."""

from __future__ import annotations

from typing import Any

import yaml

from alps.reporting.shrink_card import shrink_card
from helpers.shrink_reports import shrink_report


def _front_matter(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return fields


def test_the_card_has_the_figures_of_the_report() -> None:
    card = shrink_card(shrink_report())
    assert "25.0 % of the parameters were removed: 4,000 -> 3,000," in card
    assert "| `intermediate_size` | 44 | 32 |" in card
    assert "Calibrated on text.txt: 8 windows of 32 tokens, seed 7, sha256 aaaaaaaaaaaa." in card
    assert "Removed blocks: 5, 3." in card and "tuned" not in card
    assert "`alps.yaml` the settings" in card and "| torch | 2.6 |" in card


def test_what_was_not_done_is_not_said() -> None:
    report = shrink_report().model_copy(update={"removals": []})
    unseeded = report.model_copy(update={"calibration": report.calibration.model_copy(update={"seed": None})})
    card = shrink_card(unseeded, has_settings=False)
    assert "Removed blocks" not in card and "seed" not in card and "alps.yaml" not in card


def test_hubs_get_a_base_model_and_nobody_a_folder() -> None:
    hub = shrink_card(shrink_report(model="owner/name"))
    assert _front_matter(hub)["base_model"] == "owner/name" and "# owner/name, shrunk" in hub
    local = shrink_card(shrink_report(model="/home/user/secret/tiny"))
    assert "base_model" not in _front_matter(local) and "secret" not in local and "# tiny, shrunk" in local
    assert _front_matter(local)["tags"] == ["pruned", "structured-pruning"]


def test_long_values_are_cut() -> None:
    report = shrink_report()
    after = report.after.model_copy(update={"fields": {"layer_types": ["full_attention"] * 40}})
    card = shrink_card(report.model_copy(update={"after": after}))
    (row,) = (line for line in card.splitlines() if "layer_types" in line)
    assert row.endswith("... |") and len(row) < 120
