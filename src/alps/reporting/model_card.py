"""Model card of a pruned checkpoint: what was pruned, how, and at what cost in accuracy."""

from __future__ import annotations

from pathlib import Path

import yaml

from alps.models.auto_class import reads_images
from alps.models.load import looks_local
from alps.reporting.run_report import RunReport, all_patterns, kept_sentence


def model_card(report: RunReport, page: bool = False) -> str:
    """Write README.md of a pruned directory, with the front matter that model hubs read.

    Args:
        report: of the run that made the checkpoint.
        page: the directory has a report.html, which the card mentions.
    """
    is_tuned = bool(report.distillations or report.reconstructions)
    unchanged = "pruning left everything else unchanged" if is_tuned else "everything else is unchanged"
    kept = f"{kept_sentence(report)}. " if report.kept else ""
    loader = "AutoModelForImageTextToText" if reads_images(report.architecture) else "AutoModelForCausalLM"
    lines = [
        *_front_matter(report),
        f"# {_title(report)}",
        "",
        *_distillation_lines(report),
        *_reconstruction_lines(report),
        f"{report.zeros:,} of {report.entries:,} weights ({100 * report.sparsity:.2f} %) in {len(report.layers)} "
        f"linear layers are zero; {unchanged}. {kept}"
        f"The files are an ordinary dense checkpoint with zeros in it: it loads with `{loader}.from_pretrained`, and "
        "has the size and speed of the dense one until it is packed or compressed.",
        "",
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
    lines += [
        "",
        "`report.json` has the error and the solver's record of every layer, and the time of each phase"
        + ("; `report.html` shows them as figures." if page else "."),
        "",
    ]
    return "\n".join(lines)


def _front_matter(report: RunReport) -> list[str]:
    is_local = looks_local(report.model)
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if reads_images(report.architecture) else "text-generation",
        # A hub refuses a base model that is not on a hub, and a card must not show the user's folders.
        **({} if is_local or "/" not in report.model else {"base_model": report.model}),
        "tags": ["pruned", "sparse", report.method, *(["distilled"] if report.distillations else [])],
    }
    return ["---", yaml.safe_dump(fields, sort_keys=False).strip(), "---", ""]


def _title(report: RunReport) -> str:
    name = Path(report.model).name if looks_local(report.model) else report.model
    pattern = f"{report.pattern}{' and more' if report.overrides else ''}"
    distilled = ", then distilled" if report.distillations else ""
    return f"{name}, pruned to {pattern} with {report.method}{distilled}"


def _table_rows(report: RunReport) -> list[str]:
    rows = [f"| method, pattern | {report.method}, {all_patterns(report)} |"]
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
    return [
        "**Distilled, not one-shot.** After pruning, the kept weights, norms and biases were trained towards the dense "
        "model; the zeros stayed zero. Compare this checkpoint with distilled ones only. The errors and perplexities "
        "below are those of the one-shot run before.",
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
    lines = [
        "**Blocks reconstructed.** After pruning, the kept weights, norms and biases of every block were tuned to the "
        "outputs of the dense model's block; the zeros stayed zero. The errors below are those before.",
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
