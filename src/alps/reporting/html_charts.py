"""Panels of the page with curves and bars: perplexity against sparsity, time by phase, peak memory."""

from __future__ import annotations

from collections.abc import Sequence

from alps.reporting.compare_results import Result
from alps.reporting.run_report import INSIDE_SOLVE
from alps.reporting.run_selection import Runs
from alps.reporting.svg import (
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Key,
    Picture,
    PictureGroup,
    Section,
    box_keys,
    canvas,
    format_number,
    line_keys,
    log_axis,
    series_style,
    to_svg,
)

# Heights of a bar and of a row of bars, in points.
_BAR, _ROW = 13.0, 34.0


def perplexity_section(runs: Runs) -> Section | None:
    """Draw perplexity over sparsity, one panel per text and one line per method.

    N:M patterns, or a single sparsity, become rows of points.
    """
    texts = [record.text for record in (runs.dense or runs.pruned[0]).evaluations]
    lines = runs.ratios if len(runs.ratios) > 1 else []
    rows = [*(runs.ratios if not lines else []), *runs.groups]
    keys, groups = line_keys(runs.methods), list[PictureGroup]()
    for label, patterns, draw in (("", lines, _lines), ("N:M patterns" if lines else "", rows, _points)):
        drawn = [i for i in range(len(texts)) if _all_values(runs, patterns, i)]
        pictures = [draw(runs, patterns, i, texts[i]) for i in drawn]
        if pictures:
            groups.append(PictureGroup(label, pictures, [] if groups else keys))
    ends = "; bars go from the smallest to the largest of the seeds" if len(runs.seeds) > 1 else ""
    text = f"Lower is better; logarithmic scale{ends}. The dashed line is the dense model."
    return Section("perplexity", "Perplexity", text, groups) if groups else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _description(runs: Runs, patterns: Sequence[str], i: int, text: str) -> str:
    value = runs.dense_perplexity(i)
    dense = "" if value is None else f" Dense: {format_number(value)}."
    parts = [f"Perplexity on {text}.{dense}"]
    for method in runs.methods:
        by_pattern = [(pattern, runs.perplexities(method, pattern, i)) for pattern in patterns]
        figures = ", ".join(f"{format_number(_mean(values))} at {pattern}" for pattern, values in by_pattern if values)
        parts.append(f"{method}: {figures}." if figures else "")
    return " ".join(part for part in parts if part)


def _all_values(runs: Runs, patterns: Sequence[str], i: int) -> list[float]:
    return [value for method in runs.methods for p in patterns for value in runs.perplexities(method, p, i)]


def _bounds(runs: Runs, patterns: Sequence[str], i: int) -> tuple[float, float]:
    values = _all_values(runs, patterns, i)
    dense = runs.dense_perplexity(i)
    values += [] if dense is None else [dense]
    return min(values), max(values)


def _lines(runs: Runs, patterns: Sequence[str], i: int, text: str) -> Picture:
    axes = canvas(250)
    log_axis(axes, "y", *_bounds(runs, patterns, i))
    sparsities = {p: next(r.sparsity for r in runs.pruned if r.pattern == p) for p in patterns}
    dense = runs.dense_perplexity(i)
    if dense is not None:
        axes.axhline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        at = {"xy": (1, dense), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"dense {format_number(dense)}", xytext=(0, 4), ha="right", color=MUTED, fontsize=10, **at)  # type: ignore[arg-type]
    for order, method in enumerate(runs.methods):
        colour, marker, dash = series_style(order)
        points = [(sparsities[p], values) for p in patterns if (values := runs.perplexities(method, p, i))]
        x, means = [sparsity for sparsity, _ in points], [_mean(values) for _, values in points]
        # Rounding may put the mean of equal values outside their range.
        ends = [[max(m - min(v), 0.0) for m, (_, v) in zip(means, points, strict=True)]]
        ends += [[max(max(v) - m, 0.0) for m, (_, v) in zip(means, points, strict=True)]]
        bars = ends if any(len(values) > 1 for _, values in points) else None
        axes.errorbar(x, means, yerr=bars, color=colour, marker=marker, linestyle=dash, elinewidth=1.2, capsize=2)
    axes.set_xticks(list(sparsities.values()), [f"{100 * sparsity:.4g} %" for sparsity in sparsities.values()])
    axes.set_xlabel("sparsity")
    return Picture(text, to_svg(axes, f"lines-{i}", _description(runs, patterns, i, text)))


def _points(runs: Runs, patterns: Sequence[str], i: int, text: str) -> Picture:
    """Draw a row per method under each pattern: the mean with its number, and the range of the seeds."""
    rows = [(p, m, values) for p in patterns for m in runs.methods if (values := runs.perplexities(m, p, i))]
    height = 13.0 * len(rows) + 19.0 * len({p for p, _, _ in rows})
    axes = canvas(height + 36, left=12, right=44)
    log_axis(axes, "x", *_bounds(runs, patterns, i))
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    dense = runs.dense_perplexity(i)
    if dense is not None:
        axes.axvline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    y, before = 0.0, ""
    for pattern, method, values in rows:
        if pattern != before:
            y, before = y + 19, pattern
            axes.text(1, y - 10, pattern, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold")
        colour, marker, _ = series_style(runs.methods.index(method))
        mean, middle = _mean(values), y + 6.5
        axes.plot([min(values), max(values)], [middle, middle], color=colour, linewidth=1.2)
        axes.plot([mean], [middle], color=colour, marker=marker, linestyle="none")
        at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
        axes.annotate(format_number(mean), (max(values), middle), **at)  # type: ignore[arg-type]
        y += 13
    axes.set_xlabel("perplexity")
    return Picture(text, to_svg(axes, f"points-{i}", _description(runs, patterns, i, text)))


def cost_section(runs: Runs) -> Section | None:
    """Draw the time of a run by phase, and its peak memory, at the pattern that is shown first."""
    pattern = runs.patterns[0]
    (time, keys), memory = _time(runs, pattern), _memory(runs, pattern)
    pictures = [picture for picture in (time, memory) if picture is not None]
    text = f"Means over seeds, at {pattern}." if len(runs.seeds) > 1 else f"At {pattern}."
    return Section("cost", "Time and memory", text, [PictureGroup("", pictures, keys)]) if pictures else None


def split_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Split the wall time of a run into disjoint phases, which add up to its total.

    Args:
        seconds: by phase, see `alps.reporting.run_report.PHASES`.

    Returns:
        Seconds by phase: `solve` without the parts that are inside it, and `other` for time outside all phases.
    """
    total = seconds.get("total", sum(v for k, v in seconds.items() if k not in INSIDE_SOLVE))
    parts = {name: value for name, value in seconds.items() if name != "total"}
    inside = sum(parts.get(name, 0.0) for name in INSIDE_SOLVE)
    parts["solve"] = max(parts.get("solve", 0.0) - inside, 0.0)
    parts["other"] = max(total - sum(parts.values()), 0.0)
    return parts


def _time(runs: Runs, pattern: str) -> tuple[Picture | None, list[Key]]:
    rows: list[tuple[str, dict[str, float]]] = []
    for method in runs.methods:
        splits = [split_seconds(result.seconds) for result in runs.select(method, pattern) if result.seconds]
        names = dict.fromkeys(name for parts in splits for name in parts)
        if splits:
            rows.append((method, {name: sum(p.get(name, 0.0) for p in splits) / len(splits) for name in names}))
    whole = sum(sum(parts.values()) for _, parts in rows)
    if not whole:
        return None, []
    sums = {name: sum(parts.get(name, 0.0) for _, parts in rows) for _, parts in rows for name in parts}
    shown = sorted((name for name in sums if name != "other"), key=lambda name: -sums[name])[: len(SERIES) - 1]
    shown = [name for name in shown if sums[name] > 0.002 * whole]
    cut = [(m, [*(parts.get(n, 0.0) for n in shown), sum(parts.values()) - sum(parts.get(n, 0.0) for n in shown)])
           for m, parts in rows]  # fmt: skip
    labels = [(method, f"{format_number(sum(values))} s") for method, values in cut]
    description = [
        f"{m}: {format_number(sum(v))} s, most of it {max(zip(v, [*shown, 'other'], strict=True))[1]}." for m, v in cut
    ]
    values = [values for _, values in cut]
    picture = _bars("time", "Seconds to prune", labels=labels, rows=values, stack=SERIES, description=description)
    return picture, box_keys([*shown, "other"])


def _memory(runs: Runs, pattern: str) -> Picture | None:
    by_method = [(method, runs.select(method, pattern)) for method in runs.methods]
    rows = [(method, _peaks(results)) for method, results in by_method if results]
    if not any(host or device for _, (host, device) in rows):
        return None
    on_device = any(device for _, (_, device) in rows)
    labels = [
        (method, f"{format_number(host)} / {format_number(device)} GiB" if on_device else f"{format_number(host)} GiB")
        for method, (host, device) in rows
    ]
    values = [[host, device] if on_device else [host] for _, (host, device) in rows]
    description = [f"{method}: {text}." for method, text in labels]
    title = "Peak memory" + (", host above device" if on_device else " of the host")
    return _bars("memory", title, labels=labels, rows=values, stack=(), description=description)


def _peaks(results: Sequence[Result]) -> tuple[float, float]:
    return (
        _mean([result.peak_host_bytes for result in results]) / 2**30,
        _mean([result.peak_device_bytes for result in results]) / 2**30,
    )


def _bars(
    name: str,
    title: str,
    *,
    labels: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[float]],
    stack: Sequence[str],
    description: Sequence[str],
) -> Picture:
    """Draw a bar per row, with name and number above it, so that long names have room.

    Args:
        name: unique among the figures of the page.
        title: heading.
        labels: text at the left and at the right of each row.
        rows: values of each row.
        stack: colours in which the values of a row are stacked; without any they become separate grey bars.
        description: sentences for readers who do not see the figure.
    """
    axes = canvas(_ROW * len(rows) + 4, left=2, bottom=2, top=2, right=2)
    axes.set_axis_off()
    axes.set_ylim(_ROW * len(rows), 0)
    axes.set_xlim(0, max(sum(values) if stack else max(values) for values in rows) or 1.0)
    for i, ((left, right), values) in enumerate(zip(labels, rows, strict=True)):
        top, start = _ROW * i, 0.0
        room = WIDTH // 7 - len(right)
        left = left if len(left) <= room else left[: room - 1] + "…"
        axes.text(0, top + 9, left, transform=axes.get_yaxis_transform(), va="center", color=INK)
        axes.text(1, top + 9, right, transform=axes.get_yaxis_transform(), va="center", ha="right", color=INK)
        thick = _BAR if stack else _BAR / len(values)
        for index, value in enumerate(values):
            y = top + 18 + (0.0 if stack else index * thick)
            axes.barh(y, value, thick, start, align="edge", color=stack[index] if stack else (MUTED, INK)[index])
            start += value if stack else 0.0
    return Picture(title, to_svg(axes, name, " ".join([f"{title}.", *description])))
