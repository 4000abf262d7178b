"""Panel of the page on the convergence of ADMM for a few layers: Theorem 1 of arXiv 2406.07831 in practice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from alps.reporting.compare_results import LayerResult, Result, SupportCheck
from alps.reporting.run_selection import Runs
from alps.reporting.svg import (
    Picture,
    PictureGroup,
    Section,
    canvas,
    format_number,
    line_keys,
    log_axis,
    series_style,
    to_svg,
)

Figure = Callable[[SupportCheck], float | None]
# Values drawn over the iterations: short name, heading, function of a check.
_FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("gap", "‖W − D‖ / ‖W‖: distance of the two copies", lambda check: check.gap),
    ("penalty", "Penalty ρ", lambda check: check.rho),
    ("bound", "ρ · ‖W − D‖ / ‖W‖, which Theorem 1 bounds", lambda check: check.gap * check.rho),
    ("change", "Entries of the support that changed since the last check", lambda check: float(check.support_change)),
    ("error", "Relative error of D, before the refit", lambda check: check.error),
)


def convergence_section(runs: Runs) -> Section | None:
    """Draw the checks of one run per pattern over the iterations, a line per traced layer.

    The run is that of `alps`, else the first with checks.
    """
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        traced = [result for result in runs.first_seeds(pattern) if any(layer.trace for layer in result.layers)]
        plain = next((result for result in traced if result.method == "alps"), None)
        if traced:
            groups.append(_group(f"trace-{len(groups)}", plain or traced[0], bool(groups)))
    text = (
        "ADMM keeps two copies of a layer's weights: W, which is unconstrained, and D, which satisfies the pattern. "
        "The penalty ρ grows while the support of D changes, and ‖W − D‖ ≤ C/ρ brings the copies together. "
        "A dotted line is a restart with a smaller penalty. Of the layers that were traced, those with the smallest, "
        "the median and the largest error are shown."
    )
    return Section("traces", "Convergence of ADMM", text, groups) if groups else None


def _group(name: str, result: Result, folded: bool) -> PictureGroup:
    layers = [layer for layer in result.layers if layer.trace]
    pictures = [
        _picture(f"{name}-{short}", title, layers, figure)
        for short, title, figure in _FIGURES
        if any(figure(check) for layer in layers for check in layer.trace)
    ]
    seed = "" if result.seed is None else f", seed {result.seed}"
    keys = line_keys([_label(layer) for layer in layers], markers=False)
    return PictureGroup(f"{result.method} at {result.pattern}{seed}", pictures, keys, folded=folded)


def _label(layer: LayerResult) -> str:
    return layer.name if layer.error is None else f"{layer.name}, error {format_number(layer.error)}"


def _picture(name: str, title: str, layers: Sequence[LayerResult], figure: Figure) -> Picture:
    axes = canvas(200)
    counts = name.endswith("-change")
    values = [value for layer in layers for check in layer.trace if (value := figure(check))]
    if counts:
        top = math.ceil(math.log10(max(values)))
        axes.set_yscale("symlog", linthresh=1, linscale=0.6)
        axes.set_ylim(-0.2, 10**top)
        ticks = [0, *(10**power for power in range(0, top + 1, max(1, -(-top // 5))))]
        axes.set_yticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
    else:
        log_axis(axes, "y", min(values), max(values))
    parts = [f"{title}."]
    for index, layer in enumerate(layers):
        colour, _, dash = series_style(index)
        x, y = list[float](), list[float]()
        for before, check in zip([None, *layer.trace[:-1]], layer.trace, strict=True):
            value = figure(check)
            if before is not None and check.rho < before.rho:
                x, y = [*x, before.iteration], [*y, math.nan]
                axes.axvline(before.iteration, color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
            if value is not None and (value > 0 or counts):
                x, y = [*x, check.iteration], [*y, value]
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6)
        finite = [value for value in y if not math.isnan(value)]
        if finite:
            parts.append(
                f"{layer.name}: {format_number(finite[0])} at iteration {layer.trace[0].iteration}, "
                f"{format_number(finite[-1])} at {layer.trace[-1].iteration}."
            )
    axes.set_xlim(0, None)
    axes.set_xlabel("iteration")
    return Picture(title, to_svg(axes, name, " ".join(parts)))
