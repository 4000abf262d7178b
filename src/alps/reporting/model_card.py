"""Model card of a pruned checkpoint: what was pruned, how, and at what cost in accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alps.models.auto_class import reads_images
from alps.models.load import looks_local
from alps.reporting.card_metadata import front_matter, licence_sentence
from alps.reporting.run_report import STRUCTURED, RunReport, all_patterns, kept_sentence
from alps.reporting.shrink_card import structure_lines
from alps.reporting.shrink_report import ShrinkReport


def model_card(
    report: RunReport,
    page: bool = False,
    structure: ShrinkReport | None = None,
    source: Mapping[str, Any] | None = None,
) -> str:
    """Write README.md of a pruned directory, with the front matter that model hubs read.

    Args:
        report: of the run that made the checkpoint.
        page: the directory has a report.html, which the card mentions.
        structure: report of the structured pruning before the run, which the card repeats; None if there is none.
        source: fields of the source's card, see `alps.reporting.card_metadata.read_source_card`; None if it has none.
    """
    lines = [
        *_head(report, source or {}),
        *_distillation_lines(report),
        *_reconstruction_lines(report),
        *([] if structure is None else [*structure_lines(structure), ""]),
        *_zeros_lines(report),
        "| | |",
        "|---|---|",
        *_table_rows(report),
    ]
    if evaluations := [*report.dense_evaluations, *report.evaluations]:
        lines += ["", "| perplexity of | text | windows x tokens | |", "|---|---|---|---:|"]
        lines += [
            f"| {record.model} | {record.text} | {record.windows} x {record.seqlen} | {record.perplexity_text('.2f')} |"
            for record in evaluations
        ]
    return "\n".join([*lines, "", licence_sentence(source or {}), "", _files_sentence(page, structure), ""])


def _zeros_lines(report: RunReport) -> list[str]:
    """State which weights are zero, and what that means for whoever loads the files."""
    if report.is_structured:
        return []
    is_tuned = bool(report.distillations or report.reconstructions)
    unchanged = "pruning left everything else unchanged" if is_tuned else "everything else is unchanged"
    kept = f"{kept_sentence(report)}. " if report.kept else ""
    loader = "AutoModelForImageTextToText" if reads_images(report.architecture) else "AutoModelForCausalLM"
    return [
        f"{report.zeros:,} of {report.entries:,} weights ({100 * report.sparsity:.2f} %) in {len(report.layers)} "
        f"linear layers are zero; {unchanged}. {kept}"
        f"The files are an ordinary dense checkpoint with zeros in it: it loads with `{loader}.from_pretrained`, and "
        "has the size and speed of the dense one until it is packed or compressed.",
        "",
    ]


def _files_sentence(page: bool, structure: ShrinkReport | None) -> str:
    figures = "; `report.html` shows them as figures" if page else ""
    kept = "" if structure is None else " `shrink.json` lists what was kept of every block."
    records = "the error and the solver's record of every layer, and the time of each phase"
    return f"`report.json` has {records}{figures}.{kept}"


def _head(report: RunReport, source: Mapping[str, Any]) -> list[str]:
    later = [run.calibration for run in report.reconstruction_runs] + [run.calibration for run in report.distillations]
    return front_matter(
        _title(report),
        report.model,
        architecture=report.architecture,
        source=source,
        tags=_tags(report),
        calibrations=[report.calibration, *later],
        # Figures of the one-shot run are not those of a model that was tuned afterwards.
        evaluations=[] if later else report.evaluations,
    )


def _tags(report: RunReport) -> list[str]:
    method = "structured-pruning" if report.method == STRUCTURED else report.method
    sparse = [] if report.is_structured else ["sparse"]
    return ["pruned", *sparse, method, *(["distilled"] if report.distillations else [])]


def _title(report: RunReport) -> str:
    name = Path(report.model).name if looks_local(report.model) else report.model
    pattern = f"{report.pattern}{' and more' if report.overrides else ''}"
    distilled = ", then distilled" if report.distillations else ""
    if report.method == STRUCTURED:
        zeros = "" if report.is_structured else f", {pattern} zeros"
        return f"{name}, shrunk by {STRUCTURED}{zeros}{distilled}"
    return f"{name}, pruned to {pattern} with {report.method}{distilled}"


def _table_rows(report: RunReport) -> list[str]:
    rows = [] if report.is_structured else [f"| method, pattern | {report.method}, {all_patterns(report)} |"]
    if report.mean_error is not None:
        rows.append(f"| mean relative reconstruction error | {report.mean_error:.4f} |")
        rows.append(f"| mean error of magnitude pruning on the same inputs | {report.mean_magnitude_error:.4f} |")
    if any(layer.zeros_before is not None for layer in report.layers):
        zeros_before = sum(layer.zeros_before or 0 for layer in report.layers)
        rows.append(f"| zeros before pruning, all kept | {zeros_before:,} |")
    if used := report.calibration:
        rows.append(
            f"| calibration | {used.source}: {used.windows} windows of {used.seqlen} tokens"
            f"{', each begun with BOS' if used.bos else ''}, seed {used.seed}, "
            f"sha256 {used.sha256[:12]} |"
        )
    return rows + [f"| {name} | {value} |" for name, value in report.versions.items()]


def _distillation_lines(report: RunReport) -> list[str]:
    """State that the weights were trained after pruning, which a reader needs before any figure."""
    if not report.distillations:
        return []
    rows = [
        f"| {run.steps} | {run.tokens:,} | {run.lr:g} | {run.calibration.source} | {run.kl_before:.4f} | "
        f"{run.kl_after:.4f} |"
        for run in report.distillations
    ]
    trained = "the weights of all layers," if report.is_structured else "the kept weights,"
    before = "" if report.is_structured else " The errors and perplexities below are those of the one-shot run before."
    return [
        f"**Distilled, not one-shot.** After pruning, {trained} norms and biases were trained towards the dense "
        f"model{_zeros_stayed(report)}. Compare this checkpoint with distilled ones only.{before}",
        "",
        "| steps | tokens | learning rate | text | held-back KL before | after |",
        "|---:|---:|---:|---|---:|---:|",
        *rows,
        "",
    ]


def _reconstruction_lines(report: RunReport) -> list[str]:
    """State that the blocks were reconstructed, and on which windows if that was a separate job."""
    if not report.reconstructions:
        return []
    errors = "" if report.is_structured else " The errors below are those before."
    lines = [
        "**Blocks reconstructed.** After pruning, the kept weights, norms and biases of every block were tuned to the "
        f"outputs of the dense model's block{_zeros_stayed(report)}.{errors}",
        "",
    ]
    if not report.reconstruction_runs:
        return lines
    records = report.reconstructions[-sum(run.blocks for run in report.reconstruction_runs) :]
    lines += [
        "| blocks | epochs | target | learning rate | calibration | mean held-back loss before | after |",
        "|---:|---:|---:|---:|---|---:|---:|",
    ]
    for run in report.reconstruction_runs:
        blocks, records = records[: run.blocks], records[run.blocks :]
        before = sum(record.before for record in blocks) / run.blocks
        after = sum(record.after for record in blocks) / run.blocks
        used = run.calibration
        lines.append(
            f"| {run.blocks} | {run.epochs} | {run.target:g} | {run.lr:g} | {used.source}: {used.windows} windows of "
            f"{used.seqlen} tokens, seed {used.seed}, sha256 {used.sha256[:12]} | {before:.4f} | {after:.4f} |"
        )
    return [*lines, ""]


def _zeros_stayed(report: RunReport) -> str:
    return "" if report.is_structured else "; the zeros stayed zero"
