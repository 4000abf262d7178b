"""Summaries and tables that the commands print, made from records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from alps.checkpoints.manifest import Manifest
from alps.core.text_format import format_peak_memory
from alps.reporting.publish import PAGE_NAME
from alps.reporting.records import ComparisonRecord, Estimate, EvaluationRecord, TaskRecord
from alps.reporting.run_report import INSIDE_SOLVE, RunReport, all_patterns, kept_sentence
from alps.reporting.shrink_report import ExpertSelection, ShrinkReport

if TYPE_CHECKING:
    from alps.cli.demo_run import DemoRow
    from alps.evaluation.inspect import Inspection

_DENSE_LINES = 20


def prune_summary(report: RunReport, out: Path) -> Text:
    """Summarise a run in a few lines: zeros, errors, warnings, cost, files."""
    lines = [
        f"{report.method} {all_patterns(report)}: {report.zeros:,} of {report.entries:,} weights are zero "
        f"({100 * report.sparsity:.3f} %) in {len(report.layers)} linear layers."
    ]
    if report.mean_error is not None:
        lines.append(
            f"Mean relative error {report.mean_error:.4f}; magnitude pruning would have left "
            f"{report.mean_magnitude_error:.4f} on the same inputs."
        )
    if report.kept:
        lines.append(f"{kept_sentence(report)}.")
    lines += _warnings(report)
    skipped = [row for row in report.dense if row.rule is None and row.reason != "embedding or output head"]
    if skipped:
        first = f"{skipped[0].name} ({skipped[0].reason})"
        lines.append(f"Left dense: {len(skipped)} parameters besides the embeddings, first {first}.")
    noted = [(site.name, note) for site in report.layers for note in site.solve["notes"]]
    if noted:
        lines.append(f"Notes on {len(noted)} layers in report.json, first {noted[0][0]}: {noted[0][1]}.")
    phases = ", ".join(
        f"{phase} {seconds:.1f}"
        for phase, seconds in sorted(report.seconds.items(), key=lambda item: item[0] != "load")
        if phase not in (*INSIDE_SOLVE, "total")
    )
    memory = format_peak_memory(report.peak_host_bytes, report.peak_device_bytes, report.device)
    lines.append(f"{report.seconds['total']:.0f} s ({phases}); peak memory {memory}.")
    lines.append(f"Written to {out}: weights, tokenizer, report.json, {_page_name(out)}README.md.")
    return Text("\n".join(lines))


def _warnings(report: RunReport) -> list[str]:
    """Return the notes of the run, and a line on experts that received too few tokens."""
    lines = [f"Note: {note}" for note in report.notes]
    if undersampled := [site for site in report.layers if site.pooled_tokens]:
        experts = {(site.name.rsplit(".", 2)[0], site.expert) for site in undersampled}
        all_experts = {(site.name.rsplit(".", 2)[0], site.expert) for site in report.layers if site.expert is not None}
        worst = min(undersampled, key=lambda site: (site.tokens or 0) / site.shape[1])
        lines.append(
            f"WARNING: {len(experts)} of {len(all_experts)} experts received too few calibration tokens, the worst "
            f"{worst.tokens} for {worst.shape[1]} inputs ({worst.name}): their statistics were completed with average "
            "tokens of all experts; use more samples."
        )
    return lines


def shrink_summary(report: ShrinkReport, out: Path) -> Text:
    """Summarise a structured pruning run in a few lines: sizes, errors, cost, files."""
    before, after = report.before, report.after
    fields = ", ".join(f"{name} {before.fields.get(name)} -> {value}" for name, value in after.fields.items())
    lines = [
        f"{before.parameters:,} -> {after.parameters:,} parameters ({100 * report.share_removed:.1f} % fewer): "
        f"{fields}."
    ]
    if report.removals:
        removed = ", ".join(
            f"{removal.block}" if removal.kl is None else f"{removal.block} (KL {removal.kl:.4f})"
            for removal in report.removals
        )
        lines.append(f"Removed blocks, in this order: {removed}.")
    if report.experts is not None:
        lines.append(_describe_experts(report.experts))
    if report.speedup is not None:
        for candidate in report.speedup.candidates:
            chosen = " (chosen)" if candidate == report.speedup.chosen else ""
            lines.append(f"{candidate.describe()}{chosen}.")
        lines.append(report.speedup.outcome)
    errors = [block.error for block in report.blocks]
    lines.append(
        f"Mean relative error of the hidden states: {sum(errors) / len(errors):.4f}, {errors[-1]:.4f} after the last "
        "block."
    )
    if tuned := [block.reconstruction for block in report.blocks if block.reconstruction is not None]:
        first, last = (sum(values) / len(tuned) for values in ([t.before for t in tuned], [t.after for t in tuned]))
        lines.append(f"Block reconstruction: mean held-back loss {first:.4f} before, {last:.4f} after.")
    if protected := sum(cut.protected for block in report.blocks for cut in block.cuts):
        lines.append(f"{protected} channels were kept because they carry a massive activation.")
    lines += [f"Note: {note}" for note in report.notes]
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items() if phase != "total")
    memory = format_peak_memory(report.peak_host_bytes, report.peak_device_bytes, report.device)
    lines.append(f"{report.seconds['total']:.0f} s ({phases}); peak memory {memory}.")
    lines.append(f"Written to {out}: weights, tokenizer, shrink.json, README.md.")
    return Text("\n".join(lines))


def _describe_experts(selection: ExpertSelection) -> str:
    candidates = ", ".join(
        f"{candidate.name} {candidate.kl:.4f} and {candidate.repetition:.0%}" for candidate in selection.candidates
    )
    return (
        f"Experts: the set of {selection.chosen} was kept. KL before the refit, and repeated phrases in continuations: "
        f"{candidates}; with all experts {selection.dense_repetition:.0%}."
    )


def distillation_summary(report: RunReport, out: Path) -> Text:
    """Summarise the last distillation in a few lines."""
    last = report.distillations[-1]
    memory = format_peak_memory(last.peak_host_bytes, last.peak_device_bytes, last.device)
    lines = [
        f"Distilled, so not one-shot: {last.steps} steps, {last.tokens:,} tokens, lr {last.lr:g}, "
        f"{last.seconds:.0f} s ({last.stopped}).",
        f"KL to the dense model on {last.held_back_windows} held-back windows: {last.kl_before:.4f} before, "
        f"{last.kl_after:.4f} after (step {last.best_step}).",
        _zeros_and_memory(report, memory),
        f"Written to {out}: weights, tokenizer, report.json, {_page_name(out)}README.md.",
    ]
    return Text("\n".join(lines))


def reconstruction_summary(report: RunReport, out: Path) -> Text:
    """Summarise the last block reconstruction in a few lines."""
    last = report.reconstruction_runs[-1]
    rows = report.reconstructions[-last.blocks :]
    memory = format_peak_memory(last.peak_host_bytes, last.peak_device_bytes, last.device)
    before, after = (sum(values) / len(rows) for values in ([r.before for r in rows], [r.after for r in rows]))
    lines = [
        f"Reconstructed block by block: {sum(row.after < row.before for row in rows)} of {len(rows)} blocks improved, "
        f"mean relative loss on held-back windows {before:.4f} before, {after:.4f} after; "
        f"{last.seconds:.0f} s.",
        _zeros_and_memory(report, memory),
        f"Written to {out}: weights, tokenizer, report.json, {_page_name(out)}README.md.",
    ]
    return Text("\n".join(lines))


def _zeros_and_memory(report: RunReport, memory: str) -> str:
    if report.is_structured:
        return f"Peak memory {memory}."
    return f"{report.zeros:,} of {report.entries:,} weights are zero, the same as before; peak memory {memory}."


def _page_name(out: Path) -> str:
    return f"{PAGE_NAME}, " if (out / PAGE_NAME).is_file() else ""


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """Tabulate the dense and the pruned perplexities of the demo."""
    first = rows[0].evaluation
    table = Table(
        title=f"Perplexity on {first.text} ({first.windows} windows of {first.seqlen} tokens)",
        title_justify="left",
    )
    for heading in ("method", "perplexity", "mean error", "sparsity", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    best = min(row.evaluation.loss for row in rows[1:])
    for row in rows:
        report = row.report
        value = row.evaluation.perplexity_text(".2f")
        table.add_row(
            row.method,
            f"[bold]{value}[/bold]" if row.evaluation.loss == best else value,
            "" if report is None or report.mean_error is None else f"{report.mean_error:.4f}",
            "" if report is None else f"{100 * report.sparsity:.3f} %",
            "" if report is None else f"{row.seconds:.0f}",
        )
    return table


def evaluation_table(rows: Sequence[EvaluationRecord]) -> Table:
    """Tabulate the perplexities of one model on several texts, with those of the reference if there is one."""
    first = rows[0]
    compared = [row for row in rows if isinstance(row, ComparisonRecord)]
    against = f" against {compared[0].reference} (KL in nats)" if compared else ""
    table = Table(title=f"{first.model}{against}, windows of {first.seqlen} tokens", title_justify="left")
    more = ("reference", "ratio", "KL", "agreement") if compared else ()
    _add_columns(table, "text", ("windows", "perplexity", *more))
    for row in rows:
        cells = [row.text, str(row.windows), row.perplexity_text(".3f")]
        if isinstance(row, ComparisonRecord):
            figures = ((row.reference_perplexity, ".3f"), (row.ratio, ".4f"))
            cells += ["too large" if math.isinf(value) else format(value, form) for value, form in figures]
            cells += [f"{row.kl:.4f}", f"{row.agreement:.2%}"]
        table.add_row(*cells)
    return table


def task_table(rows: Sequence[TaskRecord]) -> Table:
    """Tabulate the scores of one model in several tasks; accuracies are in per cent."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    table = Table(title=rows[0].model, title_justify="left")
    _add_columns(table, "task", ("items", "shots", *metrics))
    for row in rows:
        items = "" if row.items is None else str(row.items)
        cells = [_format_estimate(metric, row.metrics.get(metric)) for metric in metrics]
        table.add_row(row.task, items, str(row.num_fewshot), *cells)
    return table


def _add_columns(table: Table, name: str, figures: Sequence[str]) -> None:
    # In a narrow terminal names are broken into lines, and figures stay whole.
    table.add_column(name, overflow="fold", min_width=6)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)


def _format_estimate(metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    scale, form = (100.0, ".1f") if metric.startswith("acc") else (1.0, ".4g")
    value = f"{scale * estimate.value:{form}}"
    return value if estimate.stderr is None else f"{value} ± {scale * estimate.stderr:{form}}"


def pack_summary(manifest: Manifest, out: Path) -> Text:
    """Summarise a packing: bytes before and after, of the packed tensors and of the checkpoint."""
    tensors = list(manifest.tensors.values())
    packed = [tensor for tensor in tensors if tensor.kept is not None]
    dense, stored = sum(tensor.bytes for tensor in packed), sum(tensor.stored_bytes for tensor in packed)
    # Bytes of files rather than tensors: with headers, and with the files that were copied.
    shards, others = (sum(file.bytes for file in files.values()) for files in (manifest.shards, manifest.files))
    lines = [
        f"Packed {len(packed)} of {len(tensors)} tensors: {_size_change(dense, stored)}."
        if packed
        else f"None of {len(tensors)} tensors has enough zeros to be packed: all are stored dense.",
        f"All weights: {_size_change(sum(tensor.bytes for tensor in tensors), shards)}, in {len(manifest.shards)} "
        f"file{'s' * (len(manifest.shards) > 1)}; other files {others:,} bytes.",
        *_dense_in_memory(manifest),
        f"Written to {out}; `alps unpack {out} NEW-DIRECTORY` restores the checkpoint.",
    ]
    return Text("\n".join(lines))


def _dense_in_memory(manifest: Manifest) -> list[str]:
    """Say in one sentence which packed tensors are dense when they are loaded, why, and how many bytes they have."""
    names: dict[str, list[str]] = {}
    for name, reason in manifest.dense_in_memory.items():
        names.setdefault(reason, []).append(name)
    parts = [
        f"{sum(manifest.tensors[name].bytes for name in group):,} bytes of {group[0]}"
        f"{f' and {len(group) - 1} more' if len(group) > 1 else ''}, because {reason}"
        for reason, group in names.items()
    ]
    return [f"Dense in memory once loaded: {'; '.join(parts)}."] if parts else []


def _size_change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} bytes" + (f" ({after / before:.4f})" if before else "")


def unpack_summary(manifest: Manifest, out: Path) -> Text:
    """Summarise an unpacking: tensors, bytes and files."""
    total = sum(tensor.bytes for tensor in manifest.tensors.values())
    return Text(
        f"Unpacked {len(manifest.tensors)} tensors, {total:,} bytes, each with the sha256 recorded at packing.\n"
        f"Written to {out}: {', '.join(sorted(manifest.headers))}, and {len(manifest.files)} other files."
    )


def inspection_tables(inspection: Inspection) -> list[RenderableType]:
    """Tabulate sparsities by block and kind of layer, and list totals, pattern checks and dense parameters."""
    kinds = list(dict.fromkeys(layer.kind for layer in inspection.layers))
    table = Table(title=f"Zeros in {inspection.directory}, per cent", title_justify="left")
    table.add_column("block", justify="right")
    for kind in [*kinds, "all"]:
        table.add_column(kind.removesuffix("_proj"), justify="right")
    blocks = sorted({layer.block for layer in inspection.layers})
    for block in blocks:
        in_block = [layer for layer in inspection.layers if layer.block == block]
        cells = [_percent([layer for layer in in_block if layer.kind == kind]) for kind in kinds]
        table.add_row(str(block), *cells, _percent(in_block))
    columns = [_percent([layer for layer in inspection.layers if layer.kind == kind]) for kind in kinds]
    table.add_row("all", *columns, _percent(inspection.layers), style="bold")
    lines = [f"Total sparsity of the linear layers: {100 * inspection.sparsity:.4f} %"]
    if inspection.claimed:
        lines.append(f"Its report says {inspection.claimed}.")
    lines += [
        f"Pattern {check.pattern}: holds in all {check.groups:,} groups."
        if check.violations == 0
        else f"Pattern {check.pattern}: BROKEN in {check.violations:,} of {check.groups:,} groups."
        for check in inspection.checks
    ]
    lines += [f"Dense: {row.name} {tuple(row.shape)}: {row.reason}" for row in inspection.dense[:_DENSE_LINES]]
    if len(inspection.dense) > _DENSE_LINES:
        lines.append(f"Dense: {len(inspection.dense) - _DENSE_LINES} more, see --json")
    return [table, Text("\n".join(lines))]


def _percent(layers: Sequence[object]) -> str:
    entries = sum(layer.entries for layer in layers)  # type: ignore[attr-defined]
    zeros = sum(layer.zeros for layer in layers)  # type: ignore[attr-defined]
    return f"{100 * zeros / entries:.2f}" if entries else ""
