"""The model card of a pruned checkpoint: what was done to it and what that cost, for people who find the files."""

from __future__ import annotations

from pathlib import Path

import yaml

from alps.models.auto_class import reads_images
from alps.models.load import looks_local
from alps.reporting.run_report import RunReport, all_patterns, kept_sentence


def model_card(report: RunReport, page: bool = False) -> str:
    """README.md of a pruned directory, with the front matter that model hubs read; `page`: report.html is beside it."""
    local, images = looks_local(report.model), reads_images(report.architecture)
    unchanged = (
        "pruning left everything else" if report.distillations or report.reconstructions else "everything else is"
    )
    kept = f"{kept_sentence(report)}. " if report.kept else ""
    title = Path(report.model).name if local else report.model
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if images else "text-generation",
        # A hub refuses a base model that is not on a hub, and nobody else's folders are of interest.
        **({} if local or "/" not in report.model else {"base_model": report.model}),
        "tags": ["pruned", "sparse", report.method, *(["distilled"] if report.distillations else [])],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {title}, pruned to {report.pattern}{' and more' if report.overrides else ''} with {report.method}"
        + (", then recovered by distillation" if report.distillations else ""),
        "",
        *_recovered(report),
        *_matched(report),
        f"{report.zeros:,} of {report.entries:,} weights ({100 * report.sparsity:.2f} %) in {len(report.layers)} "
        f"linear layers are zero; {unchanged} unchanged. {kept}"
        "The files are an ordinary dense checkpoint with zeros in it: it loads with "
        f"`{'AutoModelForImageTextToText' if images else 'AutoModelForCausalLM'}.from_pretrained` and is as large and "
        "as fast as the dense one until it is packed or compressed.",
        "",
        "| | |",
        "|---|---|",
        f"| method, pattern | {report.method}, {all_patterns(report)} |",
    ]
    if report.mean_error is not None:
        lines.append(f"| mean relative reconstruction error | {report.mean_error:.4f} |")
        lines.append(f"| the same for magnitude pruning on the same inputs | {report.mean_magnitude_error:.4f} |")
    if any(site.zeros_before is not None for site in report.layers):
        lines.append(
            f"| zeros there before, all still zero | {sum(site.zeros_before or 0 for site in report.layers):,} |"
        )
    if used := report.calibration:
        lines.append(
            f"| calibration | {used.source}: {used.windows} windows of {used.seqlen} tokens, seed {used.seed}, "
            f"sha256 {used.sha256[:12]} |"
        )
    lines += [f"| {name} | {value} |" for name, value in report.versions.items()]
    if report.evaluations:
        lines += ["", "| perplexity of | text | windows x tokens | |", "|---|---|---|---:|"]
        lines += [
            f"| {row.model} | {row.text} | {row.windows} x {row.seqlen} | {row.perplexity:.2f} |"
            for row in report.evaluations
        ]
    lines += [
        "",
        "Every site's error, the solver's record and the time of each phase are in `report.json`"
        + (", and as figures in `report.html`." if page else "."),
        "",
    ]
    return "\n".join(lines)


def _recovered(report: RunReport) -> list[str]:
    """What is to be known before any other figure of a card: that these weights were trained after pruning."""
    if not report.distillations:
        return []
    rows = [
        f"| {run.steps} | {run.tokens:,} | {run.lr:g} | {run.calibration.source} | {run.kl_before:.4f} | "
        f"{run.kl_after:.4f} |"
        for run in report.distillations
    ]
    return [
        "**Recovered by distillation, not one-shot.** After pruning, the kept weights, norms and biases were trained "
        "towards the dense model; the zeros stayed where they were. Compare this checkpoint with recovered ones only. "
        "Errors and perplexities further below are those of the one-shot run before.",
        "",
        "| steps | tokens | learning rate | text | held-back KL before | after |",
        "|---:|---:|---:|---|---:|---:|",
        *rows,
        "",
    ]


def _matched(report: RunReport) -> list[str]:
    """That the kept weights were tuned block by block, and on what where that was a step of its own."""
    if not report.reconstructions:
        return []
    lines = [
        "**Blocks matched.** After pruning, the kept weights, norms and biases of every block were tuned to the "
        "outputs of the dense model's block; the zeros stayed where they were. Errors further below are those before.",
        "",
    ]
    if not report.reconstruction_runs:
        return lines
    rows = report.reconstructions[-sum(run.blocks for run in report.reconstruction_runs) :]
    lines += [
        "| blocks | epochs | share of the dense stream | rate | matched on | mean held-back loss before | after |",
        "|---:|---:|---:|---:|---|---:|---:|",
    ]
    for run in report.reconstruction_runs:
        mine, rows = rows[: run.blocks], rows[run.blocks :]
        before, after = sum(row.before for row in mine) / run.blocks, sum(row.after for row in mine) / run.blocks
        used = run.calibration
        lines.append(
            f"| {run.blocks} | {run.epochs} | {run.target:g} | {run.rate:g} | {used.source}: {used.windows} windows of "
            f"{used.seqlen} tokens, seed {used.seed}, sha256 {used.sha256[:12]} | {before:.4f} | {after:.4f} |"
        )
    return [*lines, ""]
