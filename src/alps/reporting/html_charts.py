"""Perplexity against sparsity, time and memory."""

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
    line_keys,
    log_axis,
    look,
    number,
    svg,
)

# Phases of a run in the order of the work; those of a solve are inside `solve`.
_BAR, _ROW = 13.0, 34.0


def perplexity(runs: Runs) -> Section | None:
    """A line a method over the ratios, one panel a text; N:M patterns, or a single ratio, as rows of points."""
    texts = [record.text for record in (runs.dense or runs.pruned[0]).evaluations]
    lines = runs.ratios if len(runs.ratios) > 1 else []
    rows = [*(runs.ratios if not lines else []), *runs.groups]
    keys, groups = line_keys(runs.methods), list[PictureGroup]()
    for label, patterns, draw in (("", lines, _lines), ("N:M patterns" if lines else "", rows, _points)):
        pictures = [draw(runs, patterns, i, text) for i, text in enumerate(texts)] if patterns else []
        if pictures:
            groups.append(PictureGroup(label, pictures, [] if groups else keys))
    ends = "; bars go from the smallest to the largest of the seeds" if len(runs.seeds) > 1 else ""
    text = f"Lower is better; logarithmic scale{ends}. The dashed line is the dense model."
    return Section("perplexity", "Perplexity", text, groups) if groups else None


def _values(runs: Runs, method: str, pattern: str, i: int) -> list[float]:
    return [result.evaluations[i].perplexity for result in runs.select(method, pattern) if i < len(result.evaluations)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _described(runs: Runs, patterns: Sequence[str], i: int, text: str) -> str:
    dense = "" if runs.dense is None else f" Dense: {number(runs.dense.evaluations[i].perplexity)}."
    parts = [f"Perplexity on {text}.{dense}"]
    for method in runs.methods:
        found = [(pattern, _values(runs, method, pattern, i)) for pattern in patterns]
        figures = ", ".join(f"{number(_mean(values))} at {pattern}" for pattern, values in found if values)
        parts.append(f"{method}: {figures}." if figures else "")
    return " ".join(part for part in parts if part)


def _bounds(runs: Runs, patterns: Sequence[str], i: int) -> tuple[float, float]:
    everything = [value for method in runs.methods for p in patterns for value in _values(runs, method, p, i)]
    everything += [] if runs.dense is None else [runs.dense.evaluations[i].perplexity]
    return min(everything), max(everything)


def _lines(runs: Runs, patterns: Sequence[str], i: int, text: str) -> Picture:
    axes = canvas(250)
    log_axis(axes, "y", *_bounds(runs, patterns, i))
    shares = {p: next(r.sparsity for r in runs.pruned if r.pattern == p) for p in patterns}
    if runs.dense is not None:
        dense = runs.dense.evaluations[i].perplexity
        axes.axhline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        at = {"xy": (1, dense), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"dense {number(dense)}", xytext=(0, 4), ha="right", color=MUTED, fontsize=10, **at)  # type: ignore[arg-type]
    for order, method in enumerate(runs.methods):
        colour, marker, dash = look(order)
        found = [(shares[p], values) for p in patterns if (values := _values(runs, method, p, i))]
        x, means = [share for share, _ in found], [_mean(values) for _, values in found]
        # The mean of equal figures may differ from them by a rounding.
        ends = [[max(m - min(v), 0.0) for m, (_, v) in zip(means, found, strict=True)]]
        ends += [[max(max(v) - m, 0.0) for m, (_, v) in zip(means, found, strict=True)]]
        spread = ends if any(len(values) > 1 for _, values in found) else None
        axes.errorbar(x, means, yerr=spread, color=colour, marker=marker, linestyle=dash, elinewidth=1.2, capsize=2)
    axes.set_xticks(list(shares.values()), [f"{100 * share:.4g} %" for share in shares.values()])
    axes.set_xlabel("share of zeros")
    return Picture(text, svg(axes, f"lines-{i}", _described(runs, patterns, i, text)))


def _points(runs: Runs, patterns: Sequence[str], i: int, text: str) -> Picture:
    """A row a method under each pattern: the mean with its figure, and the seeds' range."""
    rows = [(p, m, values) for p in patterns for m in runs.methods if (values := _values(runs, m, p, i))]
    height = 13.0 * len(rows) + 19.0 * len({p for p, _, _ in rows})
    axes = canvas(height + 36, left=12, right=44)
    log_axis(axes, "x", *_bounds(runs, patterns, i))
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    if runs.dense is not None:
        axes.axvline(runs.dense.evaluations[i].perplexity, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    y, before = 0.0, ""
    for pattern, method, values in rows:
        if pattern != before:
            y, before = y + 19, pattern
            axes.text(1, y - 10, pattern, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold")
        colour, marker, _ = look(runs.methods.index(method))
        mean, middle = _mean(values), y + 6.5
        axes.plot([min(values), max(values)], [middle, middle], color=colour, linewidth=1.2)
        axes.plot([mean], [middle], color=colour, marker=marker, linestyle="none")
        at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
        axes.annotate(number(mean), (max(values), middle), **at)  # type: ignore[arg-type]
        y += 13
    axes.set_xlabel("perplexity")
    return Picture(text, svg(axes, f"points-{i}", _described(runs, patterns, i, text)))


def cost(runs: Runs) -> Section | None:
    """Where the time of a run went, and its peaks of memory, at the pattern that is shown first."""
    pattern = runs.patterns[0]
    (time, keys), memory = _time(runs, pattern), _memory(runs, pattern)
    pictures = [picture for picture in (time, memory) if picture is not None]
    text = f"Means over seeds, at {pattern}." if len(runs.seeds) > 1 else f"At {pattern}."
    return Section("cost", "Time and memory", text, [PictureGroup("", pictures, keys)]) if pictures else None


def phases(seconds: dict[str, float]) -> dict[str, float]:
    """Wall time by phase, nothing counted twice; what no phase claims is `other`."""
    total = seconds.get("total", sum(v for k, v in seconds.items() if k not in INSIDE_SOLVE))
    parts = {name: value for name, value in seconds.items() if name != "total"}
    inside = sum(parts.get(name, 0.0) for name in INSIDE_SOLVE)
    parts["solve"] = max(parts.get("solve", 0.0) - inside, 0.0)
    parts["other"] = max(total - sum(parts.values()), 0.0)
    return parts


def _time(runs: Runs, pattern: str) -> tuple[Picture | None, list[Key]]:
    rows: list[tuple[str, dict[str, float]]] = []
    for method in runs.methods:
        found = [phases(result.seconds) for result in runs.select(method, pattern) if result.seconds]
        names = dict.fromkeys(name for parts in found for name in parts)
        if found:
            rows.append((method, {name: sum(p.get(name, 0.0) for p in found) / len(found) for name in names}))
    whole = sum(sum(parts.values()) for _, parts in rows)
    if not whole:
        return None, []
    sums = {name: sum(parts.get(name, 0.0) for _, parts in rows) for _, parts in rows for name in parts}
    shown = sorted((name for name in sums if name != "other"), key=lambda name: -sums[name])[: len(SERIES) - 1]
    shown = [name for name in shown if sums[name] > 0.002 * whole]
    cut = [(m, [*(parts.get(n, 0.0) for n in shown), sum(parts.values()) - sum(parts.get(n, 0.0) for n in shown)])
           for m, parts in rows]  # fmt: skip
    labels = [(method, f"{number(sum(values))} s") for method, values in cut]
    described = [
        f"{m}: {number(sum(v))} s, most of it {max(zip(v, [*shown, 'other'], strict=True))[1]}." for m, v in cut
    ]
    picture = _bars("time", "Seconds to prune", labels, [values for _, values in cut], SERIES, described)
    return picture, box_keys([*shown, "other"])


def _memory(runs: Runs, pattern: str) -> Picture | None:
    found = [(method, runs.select(method, pattern)) for method in runs.methods]
    rows = [(method, _peaks(results)) for method, results in found if results]
    if not any(host or device for _, (host, device) in rows):
        return None
    on_device = any(device for _, (_, device) in rows)
    labels = [
        (method, f"{number(host)} / {number(device)} GiB" if on_device else f"{number(host)} GiB")
        for method, (host, device) in rows
    ]
    values = [[host, device] if on_device else [host] for _, (host, device) in rows]
    described = [f"{method}: {text}." for method, text in labels]
    title = "Peak memory" + (", host and device below it" if on_device else " of the host")
    return _bars("memory", title, labels, values, (), described)


def _peaks(results: Sequence[Result]) -> tuple[float, float]:
    return (
        _mean([result.peak_host_bytes for result in results]) / 2**30,
        _mean([result.peak_device_bytes for result in results]) / 2**30,
    )


def _bars(
    name: str,
    title: str,
    labels: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[float]],
    stack: Sequence[str],
    described: Sequence[str],
) -> Picture:
    """A bar a row, its name and its figure above it, so that long names have room.

    Values of a row are stacked in the colours of `stack`; without any they are bars of their own, in grey.
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
        for place, value in enumerate(values):
            y = top + 18 + (0.0 if stack else place * thick)
            axes.barh(y, value, thick, start, align="edge", color=stack[place] if stack else (MUTED, INK)[place])
            start += value if stack else 0.0
    return Picture(title, svg(axes, name, " ".join([f"{title}.", *described])))
