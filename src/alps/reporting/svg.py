"""Drawing of figures as small SVG elements that take colours and fonts from the surrounding page.

matplotlib draws with placeholder colours, which become CSS variables of the page. So one drawing serves light mode,
dark mode and print. Text stays text. Equal figures give equal bytes, whatever the user's settings of matplotlib are.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

# Widths and heights are in points, which a page shows as pixels at its narrowest.
WIDTH = 360
INK, MUTED, GRID = "#0c0d01", "#0c0d02", "#0c0d03"
SERIES = tuple(f"#0c0e{i:02x}" for i in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)},
}
_STYLE = {
    "svg.fonttype": "none",
    # User text is never mathematics: a lone dollar sign would be a syntax error.
    "text.parse_math": False,
    "font.size": 11,
    "image.composite_image": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Key:
    """Entry of a legend: a name and its drawing."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Picture:
    """Figure with a heading, and a line of numbers below it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that share a legend, shown directly or folded under `label`."""

    label: str
    pictures: list[Picture]
    keys: list[Key] = field(default_factory=list)
    scale: Markup | None = None
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Part of the page; `name` is its anchor."""

    name: str
    title: str
    text: str
    groups: list[PictureGroup]


@contextmanager
def page_style() -> Iterator[None]:
    """Context in which matplotlib draws in the style of the page."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # The reader's fonts have glyphs that those of this machine may lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(height: float, *, left: float = 48, bottom: float = 36, top: float = 8, right: float = 12) -> Axes:
    """Create axes on a figure of the page's width.

    Args:
        height: of the figure, in points.
        left: margin in points, as the others.
        bottom: margin.
        top: margin.
        right: margin.
    """
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    bounds = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    return figure.add_axes(bounds)


def to_svg(axes: Axes, name: str, description: str) -> Markup:
    """Convert the figure of some axes to an element of a page.

    Args:
        axes: drawn within `page_style`.
        name: unique among the figures of the page.
        description: content of the figure with its numbers, for readers who do not see it.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<(g|svg)((?: [^>]*?)?) id="[^"]*"', r"<\1\2", text)
    text = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = text.replace("xlink:href", "href")
    text = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', _round_numbers, text)
    text = re.sub(
        r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"|<path d=\"[^\"]*\" style=\"fill: none\"/>", "", text
    )
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
    text = re.sub(r"(?<=[>]) *\n *(?=<)|\n", "", text)
    label = Markup('<svg role="img" aria-label="{}"').format(description)
    return label + Markup(text.removeprefix("<svg"))


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), attribute[0])


def series_style(index: int) -> tuple[str, str, object]:
    """Return colour, marker and dash of a series; any two series differ in at least two of them."""
    turn = index // len(SERIES)
    return SERIES[index % len(SERIES)], MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]


def line_keys(names: Sequence[str], markers: bool = True) -> list[Key]:
    """Draw the legend of lines in the order of their series."""
    keys = []
    for index, name in enumerate(names):
        colour, marker, dash = series_style(index)
        style = MarkerStyle(marker)
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=float)
        points = " ".join(f"{9 * x:.1f},{-9 * y:.1f}" for x, y in outline)
        shape = f'<polygon points="{points}" fill="{_VARIABLES[colour]}"/>' if markers else ""
        pattern = "" if isinstance(dash, str) else ' stroke-dasharray="{}"'.format(" ".join(map(str, dash[1])))  # type: ignore[index]
        line = f'<path d="M-14 0H14" stroke="{_VARIABLES[colour]}" stroke-width="2"{pattern}/>'
        keys.append(Key(name, _key(line + shape)))
    return keys


def box_keys(names: Sequence[str]) -> list[Key]:
    """Draw the legend of areas in the order of their series."""
    boxes = [f'<rect x="-9" y="-6" width="18" height="12" fill="{_VARIABLES[SERIES[i]]}"/>' for i in range(len(names))]
    return [Key(name, _key(box)) for name, box in zip(names, boxes, strict=True)]


def _key(content: str) -> Markup:
    return Markup(f'<svg class="key" viewBox="-14 -7 28 14" aria-hidden="true">{content}</svg>')


def format_number(value: float) -> str:
    """Format a number with 3 to 5 digits: 48,965, 156.3, 3.14, 0.0332; from 10^9 on as 1.23e+09."""
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """Make an axis logarithmic, with a margin around `low` to `high` and a few round ticks.

    Args:
        axes: to change.
        which: `x` or `y`.
        low: least value, positive.
        high: largest value.
    """
    assert 0 < low <= high
    room = max((high / low) ** 0.06, 1.05)
    low, high = low / room, high * room
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ticks = log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([format_tick(value) for value in ticks])


def log_ticks(low: float, high: float, limit: int = 6) -> list[float]:
    """Choose at most `limit` round numbers from `low` to `high`, such as 1, 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        ticks = [value for value in ticks if low <= value <= high]
        if len(ticks) < 2:
            narrow = (float(value) for value in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high))
            return [value for value in narrow if low <= value <= high]
        if len(ticks) <= limit:
            return ticks
    return ticks[:: math.ceil(len(ticks) / limit)]


def format_tick(value: float) -> str:
    """Format a round number at an axis: 0.002, 5, 20,000, 10⁶."""
    if 1e-3 <= value < 1e6:
        return f"{value:,.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10**power:.3g}"
    return ("" if factor == "1" else f"{factor}·") + "10" + str(power).translate(_SUPERSCRIPTS)
