"""Model card of a shrunk checkpoint: what was removed, how, and what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alps.core.text_format import format_size
from alps.models.load import looks_local
from alps.reporting.card_metadata import front_matter, licence_sentence
from alps.reporting.shrink_report import ShrinkReport, SpeedupRecord


def shrink_card(report: ShrinkReport, *, has_settings: bool = True, source: Mapping[str, Any] | None = None) -> str:
    """Write README.md of a shrunk directory, with the front matter that model hubs read.

    Args:
        report: of the run.
        has_settings: whether `alps.yaml` is written, too.
        source: fields of the source's card, see `alps.reporting.card_metadata.read_source_card`; None if it has none.
    """
    is_local = looks_local(report.model)
    name = Path(report.model).name if is_local else report.model
    lines = [
        *front_matter(
            f"{name}, shrunk by structured pruning",
            report.model,
            architecture=report.architecture,
            source=source or {},
            tags=["pruned", "structured-pruning"],
            calibrations=[report.calibration],
        ),
        *structure_lines(report),
    ]
    if any(block.reconstruction is not None for block in report.blocks):
        lines.append("The smaller blocks were tuned to the hidden states of the dense model, one after the other.")
    if report.speedup is not None:
        lines += ["", *speedup_lines(report.speedup)]
    lines += [
        "",
        licence_sentence(source or {}),
        "",
        "`shrink.json` lists what was kept of every block, with the errors"
        f"{'; `alps.yaml` the settings' if has_settings else ''}.",
        "",
        *(f"| {key} | {value} |" for key, value in {"": "", "---": "---", **report.versions}.items()),
        "",
    ]
    return "\n".join(lines)


def structure_lines(report: ShrinkReport) -> list[str]:
    """Return what was removed from a model, on which calibration text, and what loads the result, as Markdown."""
    before, after, used = report.before, report.after, report.calibration
    seed = "" if used.seed is None else f", seed {used.seed}"
    lines = [
        f"{100 * report.share_removed:.1f} % of the parameters were removed: {before.parameters:,} -> "
        f"{after.parameters:,}, {format_size(before.nbytes)} -> {format_size(after.nbytes)}. The result is an "
        "ordinary, smaller checkpoint: it loads with `AutoModelForCausalLM.from_pretrained`, and everything that takes "
        "a model of its kind takes it.",
        "",
        "| field of config.json | dense | here |",
        "|---|---:|---:|",
        *(f"| `{key}` | {_short(before.fields.get(key))} | {_short(value)} |" for key, value in after.fields.items()),
        "",
        f"Calibrated on {used.source}: {used.windows} windows of {used.seqlen} tokens{seed}, sha256 "
        f"{used.sha256[:12]}.",
    ]
    if report.removals:
        lines.append(f"Removed blocks: {', '.join(str(removal.block) for removal in report.removals)}.")
    if report.experts is not None:
        lines.append(f"The experts that stay were chosen by the selection '{report.experts.chosen}'.")
    return lines


def speedup_lines(speedup: SpeedupRecord) -> list[str]:
    """Return the candidates of a search for a speed as a Markdown table, with what was measured."""
    rows = [
        f"| {row.mlp_width or ''} | {row.heads} | {row.blocks} | {row.predicted:.2f} "
        f"| {'' if row.kl is None else f'{row.kl:.4f}'} |"
        for row in speedup.candidates
    ]
    return [
        f"The mix of structure was chosen for {speedup.speed:g} times the speed of generation in {speedup.runtime}: "
        "of the candidates below, the one of the smallest KL to the dense model after a quick pass on "
        f"{speedup.fitted_tokens:,} tokens, on {speedup.held_out_tokens:,} others. {speedup.outcome}",
        "",
        "| MLP width | heads | blocks | predicted speed | KL |",
        "|---:|---:|---:|---:|---:|",
        *rows,
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
