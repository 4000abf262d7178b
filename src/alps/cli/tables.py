"""What the commands print: tables for people, made from records."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from alps.cli.demo_run import DemoRow
    from alps.evaluation.inspect import Inspection

_DENSE_LINES = 20


def prune_summary(report: RunReport, out: Path) -> Text:
    """A few lines on what was pruned, how well, at what cost, and where it is."""
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
        lines.append(f"Notes on {len(noted)} sites in report.json, first {noted[0][0]}: {noted[0][1]}.")
    phases = ", ".join(
        f"{phase} {seconds:.1f}"
        for phase, seconds in sorted(report.seconds.items(), key=lambda one: one[0] != "load")
        if phase not in (*INSIDE_SOLVE, "total")
    )
    memory = format_peak_memory(report.peak_host_bytes, report.peak_device_bytes, report.device)
    lines.append(f"{report.seconds['total']:.0f} s ({phases}); peak memory {memory}.")
    lines.append(f"Written to {out}: weights, tokenizer, report.json, {_shown(out)}README.md.")
    return Text("\n".join(lines))


def _warnings(report: RunReport) -> list[str]:
    """Experts that few tokens were routed to, in one line, and the notes of the run."""
    lines = [f"Note: {note}" for note in report.notes]
    if starving := [site for site in report.layers if site.pooled_tokens]:
        experts = {(site.name.rsplit(".", 2)[0], site.expert) for site in starving}
        among = {(site.name.rsplit(".", 2)[0], site.expert) for site in report.layers if site.expert is not None}
        worst = min(starving, key=lambda site: (site.tokens or 0) / site.shape[1])
        lines.append(
            f"WARNING: {len(experts)} of {len(among)} experts received too few calibration tokens, the worst "
            f"{worst.tokens} for {worst.shape[1]} inputs ({worst.name}): they were filled up with average tokens of "
            "all experts; use more samples."
        )
    return lines


def recovery_summary(report: RunReport, out: Path) -> Text:
    """A few lines on what the last recovery did, and where it is."""
    last = report.distillations[-1]
    memory = format_peak_memory(last.peak_host_bytes, last.peak_device_bytes, last.device)
    lines = [
        f"Recovered by distillation, not one-shot: {last.steps} steps, {last.tokens:,} tokens, lr {last.lr:g}, "
        f"{last.seconds:.0f} s ({last.stopped}).",
        f"KL to the dense model on {last.held_back_windows} held-back windows: {last.kl_before:.4f} before, "
        f"{last.kl_after:.4f} after (step {last.best_step}).",
        f"{last.zeros:,} of {report.entries:,} weights are zero, the same as before; peak memory {memory}.",
        f"Written to {out}: weights, tokenizer, report.json, {_shown(out)}README.md.",
    ]
    return Text("\n".join(lines))


def match_summary(report: RunReport, out: Path) -> Text:
    """A few lines on what the last block matching did, and where it is."""
    last = report.reconstruction_runs[-1]
    rows = report.reconstructions[-last.blocks :]
    memory = format_peak_memory(last.peak_host_bytes, last.peak_device_bytes, last.device)
    before, after = (sum(values) / len(rows) for values in ([r.before for r in rows], [r.after for r in rows]))
    lines = [
        f"Matched to the dense model block by block: {sum(row.after < row.before for row in rows)} of {len(rows)} "
        f"blocks gained, mean relative loss on held-back windows {before:.4f} before, {after:.4f} after; "
        f"{last.seconds:.0f} s.",
        f"{last.zeros:,} of {report.entries:,} weights are zero, the same as before; peak memory {memory}.",
        f"Written to {out}: weights, tokenizer, report.json, {_shown(out)}README.md.",
    ]
    return Text("\n".join(lines))


def _shown(out: Path) -> str:
    return f"{PAGE_NAME}, " if (out / PAGE_NAME).is_file() else ""


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """Dense and pruned perplexities side by side."""
    first = rows[0].evaluation
    table = Table(
        title=f"Perplexity on {first.text} ({first.windows} windows of {first.seqlen} tokens)",
        title_justify="left",
    )
    for heading in ("method", "perplexity", "mean error", "sparsity", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    best = min(row.evaluation.perplexity for row in rows[1:])
    for row in rows:
        report = row.report
        value = f"{row.evaluation.perplexity:.2f}"
        table.add_row(
            row.method,
            f"[bold]{value}[/bold]" if row.evaluation.perplexity == best else value,
            "" if report is None or report.mean_error is None else f"{report.mean_error:.4f}",
            "" if report is None else f"{100 * report.sparsity:.3f} %",
            "" if report is None else f"{row.seconds:.0f}",
        )
    return table


def evaluation_table(rows: Sequence[EvaluationRecord]) -> Table:
    """Perplexities of one model on several texts, beside those of a reference where they were compared."""
    compared = any(isinstance(row, ComparisonRecord) for row in rows)
    more = ("reference", "ratio", "KL nats", "agreement") if compared else ()
    table = Table()
    for heading in ("model", "text", "windows", "seqlen", "perplexity", *more):
        _add_column(table, heading, heading not in ("model", "text"))
    for row in rows:
        cells = [row.model, row.text, str(row.windows), str(row.seqlen), f"{row.perplexity:.3f}"]
        if isinstance(row, ComparisonRecord):
            cells += [f"{row.reference_perplexity:.3f}", f"{row.ratio:.4f}", f"{row.kl:.5f}", f"{row.agreement:.2%}"]
        table.add_row(*cells)
    return table


def task_table(rows: Sequence[TaskRecord]) -> Table:
    """Scores of one model in several tasks: accuracies in per cent, other metrics as they are."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    table = Table()
    for heading in ("model", "task", "items", "shots", *metrics):
        _add_column(table, heading, heading not in ("model", "task"))
    for row in rows:
        items = "" if row.items is None else str(row.items)
        cells = [_estimate(metric, row.metrics.get(metric)) for metric in metrics]
        table.add_row(row.model, row.task, items, str(row.num_fewshot), *cells)
    return table


def _add_column(table: Table, heading: str, figures: bool) -> None:
    """A narrow terminal shortens names, and figures last."""
    table.add_column(heading, justify="right" if figures else "left", no_wrap=figures)


def _estimate(metric: str, found: Estimate | None) -> str:
    if found is None:
        return ""
    scale, form = (100.0, ".1f") if metric.startswith("acc") else (1.0, ".4g")
    value = f"{scale * found.value:{form}}"
    return value if found.stderr is None else f"{value} ± {scale * found.stderr:{form}}"


def pack_summary(manifest: Manifest, out: Path) -> Text:
    """Bytes before and after packing: of the packed tensors, and of the checkpoint."""
    tensors = list(manifest.tensors.values())
    packed = [tensor for tensor in tensors if tensor.kept is not None]
    dense, stored = sum(tensor.bytes for tensor in packed), sum(tensor.stored_bytes for tensor in packed)
    # Of files, not of tensors: with headers, and with all that was copied along.
    shards, others = (sum(file.bytes for file in files.values()) for files in (manifest.shards, manifest.files))
    lines = [
        f"Packed {len(packed)} of {len(tensors)} tensors: {_shrunk(dense, stored)}."
        if packed
        else f"None of {len(tensors)} tensors has enough zeros to be packed: all are stored dense.",
        f"All weights: {_shrunk(sum(tensor.bytes for tensor in tensors), shards)}, in {len(manifest.shards)} "
        f"file{'s' * (len(manifest.shards) > 1)}; other files {others:,} bytes.",
        f"Written to {out}; `alps unpack {out} NEW-DIRECTORY` gives the checkpoint back.",
    ]
    return Text("\n".join(lines))


def _shrunk(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} bytes" + (f" ({after / before:.4f})" if before else "")


def unpack_summary(manifest: Manifest, out: Path) -> Text:
    """What was written, and that it was checked."""
    total = sum(tensor.bytes for tensor in manifest.tensors.values())
    return Text(
        f"Unpacked {len(manifest.tensors)} tensors, {total:,} bytes, every one with the sha256 it was packed with.\n"
        f"Written to {out}: {', '.join(sorted(manifest.headers))}, and {len(manifest.files)} other files."
    )


def inspection_tables(findings: Inspection) -> list[RenderableType]:
    """Sparsity by block and kind of site, the totals, the pattern checks, and what is dense."""
    kinds = list(dict.fromkeys(site.kind for site in findings.layers))
    table = Table(title=f"Zeros in {findings.directory}, per cent", title_justify="left")
    table.add_column("block", justify="right")
    for kind in [*kinds, "all"]:
        table.add_column(kind.removesuffix("_proj"), justify="right")
    blocks = sorted({site.block for site in findings.layers})
    for block in blocks:
        inside = [site for site in findings.layers if site.block == block]
        cells = [_percent([site for site in inside if site.kind == kind]) for kind in kinds]
        table.add_row(str(block), *cells, _percent(inside))
    columns = [_percent([site for site in findings.layers if site.kind == kind]) for kind in kinds]
    table.add_row("all", *columns, _percent(findings.layers), style="bold")
    lines = [f"Total sparsity of the linear layers: {100 * findings.sparsity:.4f} %"]
    if findings.claimed:
        lines.append(f"Its report says {findings.claimed}.")
    lines += [
        f"Pattern {check.pattern}: holds in all {check.groups:,} groups."
        if check.violations == 0
        else f"Pattern {check.pattern}: BROKEN in {check.violations:,} of {check.groups:,} groups."
        for check in findings.checks
    ]
    lines += [f"Dense: {row.name} {tuple(row.shape)}: {row.reason}" for row in findings.dense[:_DENSE_LINES]]
    if len(findings.dense) > _DENSE_LINES:
        lines.append(f"Dense: {len(findings.dense) - _DENSE_LINES} more, see --json")
    return [table, Text("\n".join(lines))]


def _percent(sites: Sequence[object]) -> str:
    entries = sum(site.entries for site in sites)  # type: ignore[attr-defined]
    zeros = sum(site.zeros for site in sites)  # type: ignore[attr-defined]
    return f"{100 * zeros / entries:.2f}" if entries else ""
