"""Every site of a model at a glance: blocks from left to right, kinds of site from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray

from alps.reporting.compare_results import LayerResult, Result
from alps.reporting.run_selection import Runs
from alps.reporting.svg import Picture, PictureGroup, Section, canvas, log_ticks, number, svg, tick

Figure = Callable[[LayerResult], float | None]
# Budgets move sparsities by more than this; exact counts of a uniform one by far less.
_UNEVEN = 0.005
_LONGEST_KIND = 16


def errors(runs: Runs) -> Section | None:
    """Relative reconstruction errors, a map a method, on one logarithmic scale a pattern."""
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        maps = [(r.method, r, _error) for r in runs.first(pattern) if any(_error(site) for site in r.layers)]
        if maps and not any(result.method.startswith("magnitude") for _, result, _ in maps):
            result = maps[0][1]
            if any(_magnitude_error(site) for site in result.layers):
                maps.append((f"magnitude pruning on the inputs of {result.method}", result, _magnitude_error))
        values = [value for _, result, figure in maps for site in result.layers if (value := figure(site))]
        if values:
            norm = LogNorm(min(values), max(values) * (1 if max(values) > min(values) else 1.01))
            groups.append(_group(f"error-{len(groups)}", pattern, maps, norm, "viridis", bool(groups)))
    text = (
        "‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² of every site, on the calibration inputs that it was solved on; "
        f"one logarithmic scale for all maps of a pattern.{_which_seed(runs)}"
    )
    return Section("errors", "Relative error by site", text, groups) if groups else None


def sparsities(runs: Runs) -> Section | None:
    """Shares of zeros of the runs whose budget is not uniform."""
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        maps = []
        for result in runs.first(pattern):
            shares = [_sparsity(site) for site in result.layers]
            if shares and max(shares) - min(shares) > _UNEVEN:
                maps.append((result.method, result, _sparsity))
        values = [_sparsity(site) for _, result, _ in maps for site in result.layers]
        if values:
            norm = Normalize(min(values), max(values))
            groups.append(_group(f"zeros-{len(groups)}", pattern, maps, norm, "cividis", bool(groups)))
    text = f"Where a budget has put the zeros: the share of them in every site.{_which_seed(runs)}"
    return Section("sparsity", "Sparsity by site", text, groups) if groups else None


def _which_seed(runs: Runs) -> str:
    return f" Seed {runs.seeds[0]}." if len(runs.seeds) > 1 else ""


def _error(site: LayerResult) -> float | None:
    return site.error


def _magnitude_error(site: LayerResult) -> float | None:
    return site.magnitude_error


def _sparsity(site: LayerResult) -> float:
    return site.zeros / site.entries


def _group(
    name: str, pattern: str, maps: Sequence[tuple[str, Result, Figure]], norm: Normalize, colours: str, folded: bool
) -> PictureGroup:
    pictures = [
        _map(f"{name}-{i}", f"{title}, {pattern}", result.layers, figure, norm, colours)
        for i, (title, result, figure) in enumerate(maps)
    ]
    return PictureGroup(f"At {pattern}", pictures, scale=_scale(f"{name}-scale", norm, colours), folded=folded)


def _grid(sites: Sequence[LayerResult], figure: Figure) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Kinds in the order of the sites, blocks, and means of the sites of a kind in a block; NaN where there is none."""
    kinds = list(dict.fromkeys(site.kind for site in sites))
    blocks = sorted({site.block for site in sites})
    cells: dict[tuple[int, int], list[float]] = {}
    for site in sites:
        if value := figure(site):
            cells.setdefault((kinds.index(site.kind), blocks.index(site.block)), []).append(value)
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for place, values in cells.items():
        grid[place] = sum(values) / len(values)
    return kinds, blocks, grid


def _map(name: str, title: str, sites: Sequence[LayerResult], figure: Figure, norm: Normalize, colours: str) -> Picture:
    kinds, blocks, grid = _grid(sites, figure)
    words = [kind.removesuffix("_proj")[:_LONGEST_KIND] for kind in kinds]
    axes = canvas(15.0 * len(kinds) + 40, left=14 + 6.2 * max(map(len, words)), top=4)
    axes.grid(False)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.imshow(grid, norm=norm, cmap=colours, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(kinds)), words)
    step = max(1, -(-len(blocks) // 10))
    shown = range(0, len(blocks), step)
    axes.set_xticks(shown, [str(blocks[i]) for i in shown])
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    places = [f"block {site.block}, {site.kind.removesuffix('_proj')}" for site in sites]
    known = [(value, place) for site, place in zip(sites, places, strict=True) if (value := figure(site))]
    (low, lowest), (high, highest) = min(known), max(known)
    if isinstance(norm, LogNorm):
        mean = sum(value for value, _ in known) / len(known)
        note = f"mean {number(mean)}, from {number(low)} ({lowest}) to {number(high)} ({highest})"
    else:
        note = f"from {100 * low:.1f} % ({lowest}) to {100 * high:.1f} % ({highest})"
    return Picture(title, svg(axes, name, f"{title}: {note}."), note)


def _scale(name: str, norm: Normalize, colours: str) -> Markup:
    """The colours and the figures that they stand for."""
    assert norm.vmin is not None and norm.vmax is not None
    low, high = float(norm.vmin), float(norm.vmax)
    ticks = log_ticks(low, high) if isinstance(norm, LogNorm) else [low, (low + high) / 2, high]
    texts = [tick(value) if isinstance(norm, LogNorm) else f"{100 * value:.0f} %" for value in ticks]
    axes = canvas(34, left=20, right=20, top=2, bottom=20)
    axes.grid(False)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=colormaps[colours], aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_xticks([127 * float(norm(value)) for value in ticks], texts)
    return svg(axes, name, f"Colours from {number(low)} to {number(high)}.")
