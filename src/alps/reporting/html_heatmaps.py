"""Panels of the page with a heat map of all layers: blocks from left to right, kinds of layer from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray

from alps.reporting.compare_results import LayerResult, Result
from alps.reporting.run_selection import Runs
from alps.reporting.svg import Picture, PictureGroup, Section, canvas, format_number, format_tick, log_ticks, to_svg

Figure = Callable[[LayerResult], float | None]
# Sparsities of an allocation differ by more than this; those of a uniform one by far less, for exact counts.
_UNEVEN = 0.005
_LONGEST_KIND = 16


def error_section(runs: Runs) -> Section | None:
    """Draw relative reconstruction errors, one map per method, on one logarithmic scale per pattern."""
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        maps = [(r.method, r, _error) for r in runs.first_seeds(pattern) if any(_error(layer) for layer in r.layers)]
        if maps and not any(result.method.startswith("magnitude") for _, result, _ in maps):
            result = maps[0][1]
            if any(_magnitude_error(layer) for layer in result.layers):
                maps.append((f"magnitude pruning on the inputs of {result.method}", result, _magnitude_error))
        values = [value for _, result, figure in maps for layer in result.layers if (value := figure(layer))]
        if values:
            norm = LogNorm(min(values), max(values) * (1 if max(values) > min(values) else 1.01))
            groups.append(_group(f"error-{len(groups)}", pattern, maps, norm, "viridis", bool(groups)))
    text = (
        "‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² of every layer, on its calibration inputs; "
        f"one logarithmic scale for all maps of a pattern.{_which_seed(runs)}"
    )
    return Section("errors", "Relative error by layer", text, groups) if groups else None


def sparsity_section(runs: Runs) -> Section | None:
    """Draw the sparsities of the runs whose allocation is not uniform, one map per method."""
    groups = list[PictureGroup]()
    for pattern in runs.patterns:
        maps = []
        for result in runs.first_seeds(pattern):
            shares = [_sparsity(layer) for layer in result.layers]
            if shares and max(shares) - min(shares) > _UNEVEN:
                maps.append((result.method, result, _sparsity))
        values = [_sparsity(layer) for _, result, _ in maps for layer in result.layers]
        if values:
            norm = Normalize(min(values), max(values))
            groups.append(_group(f"zeros-{len(groups)}", pattern, maps, norm, "cividis", bool(groups)))
    text = f"Allocation of the zeros: the sparsity of every layer.{_which_seed(runs)}"
    return Section("sparsity", "Sparsity by layer", text, groups) if groups else None


def _which_seed(runs: Runs) -> str:
    return f" Seed {runs.seeds[0]}." if len(runs.seeds) > 1 else ""


def _error(layer: LayerResult) -> float | None:
    return layer.error


def _magnitude_error(layer: LayerResult) -> float | None:
    return layer.magnitude_error


def _sparsity(layer: LayerResult) -> float:
    return layer.zeros / layer.entries


def _group(
    name: str, pattern: str, maps: Sequence[tuple[str, Result, Figure]], norm: Normalize, colours: str, folded: bool
) -> PictureGroup:
    pictures = [
        _map(f"{name}-{i}", f"{title}, {pattern}", result.layers, figure, norm, colours)
        for i, (title, result, figure) in enumerate(maps)
    ]
    return PictureGroup(f"At {pattern}", pictures, scale=_scale(f"{name}-scale", norm, colours), folded=folded)


def _grid(layers: Sequence[LayerResult], figure: Figure) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Arrange a value of all layers by kind and block.

    Returns:
        Kinds in the order of the layers, block indices, and means over the layers of a kind in a block (kinds, blocks);
        NaN if there is none.
    """
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = sorted({layer.block for layer in layers})
    cells: dict[tuple[int, int], list[float]] = {}
    for layer in layers:
        if value := figure(layer):
            cells.setdefault((kinds.index(layer.kind), blocks.index(layer.block)), []).append(value)
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for cell, values in cells.items():
        grid[cell] = sum(values) / len(values)
    return kinds, blocks, grid


def _map(
    name: str, title: str, layers: Sequence[LayerResult], figure: Figure, norm: Normalize, colours: str
) -> Picture:
    kinds, blocks, grid = _grid(layers, figure)
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
    names = [f"block {layer.block}, {layer.kind.removesuffix('_proj')}" for layer in layers]
    measured = [(value, name) for layer, name in zip(layers, names, strict=True) if (value := figure(layer))]
    (low, lowest), (high, highest) = min(measured), max(measured)
    if isinstance(norm, LogNorm):
        mean = sum(value for value, _ in measured) / len(measured)
        note = f"mean {format_number(mean)}, from {format_number(low)} ({lowest}) to {format_number(high)} ({highest})"
    else:
        note = f"from {100 * low:.1f} % ({lowest}) to {100 * high:.1f} % ({highest})"
    return Picture(title, to_svg(axes, name, f"{title}: {note}."), note)


def _scale(name: str, norm: Normalize, colours: str) -> Markup:
    """Draw the colour scale with its numbers."""
    assert norm.vmin is not None and norm.vmax is not None
    low, high = float(norm.vmin), float(norm.vmax)
    ticks = log_ticks(low, high) if isinstance(norm, LogNorm) else [low, (low + high) / 2, high]
    texts = [format_tick(value) if isinstance(norm, LogNorm) else f"{100 * value:.0f} %" for value in ticks]
    axes = canvas(34, left=20, right=20, top=2, bottom=20)
    axes.grid(False)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=colormaps[colours], aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_xticks([127 * float(norm(value)) for value in ticks], texts)
    return to_svg(axes, name, f"Colours from {format_number(low)} to {format_number(high)}.")
