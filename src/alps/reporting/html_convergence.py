"""How the splitting of ALPS went on the sites whose checks were kept: Theorem 1 of arXiv 2406.07831 at work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from alps.reporting.compare_results import LayerResult, Result, SupportCheck
from alps.reporting.run_selection import Runs
from alps.reporting.svg import Picture, PictureGroup, Section, canvas, line_keys, log_axis, look, number, svg

Figure = Callable[[SupportCheck], float | None]
# What is drawn over the iterations, with its name in a sentence and as a heading.
_FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("gap", "‖W − D‖ / ‖W‖: how far the two copies are apart", lambda check: check.gap),
    ("penalty", "Penalty ρ", lambda check: check.rho),
    ("bound", "ρ · ‖W − D‖ / ‖W‖, which Theorem 1 bounds", lambda check: check.gap * check.rho),
    ("change", "Entries of the support that changed since the last check", lambda check: float(check.support_change)),
    ("error", "Relative error of D, before the refit", lambda check: check.error),
)


def traces(runs: Runs) -> Section | None:
    """One run a pattern, the first that has checks; by site, against the iteration."""
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        found = [result for result in runs.first(pattern) if any(site.trace for site in result.layers)]
        plain = next((result for result in found if result.method == "alps"), None)
        if found:
            groups.append(_group(f"trace-{len(groups)}", plain or found[0], bool(groups)))
    text = (
        "The splitting keeps two copies of a site's weights: W, free, and D, under the pattern. The penalty ρ grows as "
        "long as the support of D changes, and ‖W − D‖ ≤ C/ρ brings them together. A dotted line is a new start with a "
        "smaller penalty. Shown are, among the sites that were followed, those with the smallest, the middle and the "
        "largest error."
    )
    return Section("traces", "Convergence of the splitting", text, groups) if groups else None


def _group(name: str, result: Result, folded: bool) -> PictureGroup:
    sites = [site for site in result.layers if site.trace]
    pictures = [
        _picture(f"{name}-{short}", title, sites, figure)
        for short, title, figure in _FIGURES
        if any(figure(check) for site in sites for check in site.trace)
    ]
    seed = "" if result.seed is None else f", seed {result.seed}"
    keys = line_keys([_named(site) for site in sites], markers=False)
    return PictureGroup(f"{result.method} at {result.pattern}{seed}", pictures, keys, folded=folded)


def _named(site: LayerResult) -> str:
    return site.name if site.error is None else f"{site.name}, error {number(site.error)}"


def _picture(name: str, title: str, sites: Sequence[LayerResult], figure: Figure) -> Picture:
    axes = canvas(200)
    counts = name.endswith("-change")
    values = [value for site in sites for check in site.trace if (value := figure(check))]
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
    for place, site in enumerate(sites):
        colour, _, dash = look(place)
        x, y = list[float](), list[float]()
        for before, check in zip([None, *site.trace[:-1]], site.trace, strict=True):
            value = figure(check)
            if before is not None and check.rho < before.rho:
                x, y = [*x, before.iteration], [*y, math.nan]
                axes.axvline(before.iteration, color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
            if value is not None and (value > 0 or counts):
                x, y = [*x, check.iteration], [*y, value]
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6)
        known = [value for value in y if not math.isnan(value)]
        if known:
            parts.append(
                f"{site.name}: {number(known[0])} at iteration {site.trace[0].iteration}, "
                f"{number(known[-1])} at {site.trace[-1].iteration}."
            )
    axes.set_xlim(0, None)
    axes.set_xlabel("iteration")
    return Picture(title, svg(axes, name, " ".join(parts)))
