"""The page's figures are those of the results; it holds what there is data for, and nothing that is not its own."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from PIL import Image

from alps.reporting.compare_results import DENSE, Result
from alps.reporting.html_charts import split_seconds
from alps.reporting.html_report import report_page
from alps.reporting.run_selection import Runs
from alps.reporting.svg import format_number, format_tick, line_keys, log_ticks
from helpers.comparisons import KINDS, comparison


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and its tables by their headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.best: list[str] = []
        self._place = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag in ("h2", "h3"):
            self.headings.append("")
        elif tag == "table":
            self.tables[self.headings[-1]] = []
        elif tag == "tr":
            self.tables[self.headings[-1]].append([])
        elif tag in ("th", "td"):
            self.tables[self.headings[-1]][-1].append("")
        self._place = "best" if ("class", "best") in attributes else tag

    def handle_endtag(self, tag: str) -> None:
        self._place = ""

    def handle_data(self, text: str) -> None:
        if self._place in ("h2", "h3"):
            self.headings[-1] += text
        elif self._place in ("th", "td", "best"):
            self.tables[self.headings[-1]][-1][-1] += text
            self.best += [text] if self._place == "best" else []


def pictures(text: str, beginning: str) -> list[str]:
    """The drawings whose description begins so."""
    return re.findall(rf'<svg role="img" aria-label="{re.escape(beginning)}.*?</svg>', text)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return comparison()


@pytest.fixture(scope="module")
def text(results: list[Result]) -> str:
    return report_page(results)


def test_the_tables_are_those_of_the_results(results: list[Result], text: str) -> None:
    tables = Page(text).tables
    rows = tables["Perplexity on wikitext2 (dense 24.53)"]
    assert rows[0] == ["", "0.5", "0.6", "0.7", "0.8", "2:4", "4:8"]
    means: dict[tuple[str, str], float] = {}
    for row in rows[1:]:
        for pattern, cell in zip(rows[0][1:], row[1:], strict=True):
            values = [r.evaluations[0].perplexity for r in results if (r.method, r.pattern) == (row[0], pattern)]
            means[row[0], pattern] = statistics.mean(values)
            assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    best = [min((means[m, p], m) for m in ("wanda", "alps", "best"))[1] for p in rows[0][1:]]
    shown = {
        cell for row in rows[1:] for p, cell, b in zip(rows[0][1:], row[1:], best, strict=True) if b == row[0] and p
    }
    assert shown <= set(Page(text).best)
    titles = ["KL divergence from the dense model on c4.jsonl, nats", "Mean relative reconstruction error"]
    titles += ["piqa, per cent on 500 items (dense 70.0)", "Seconds to prune"]
    titles += ["Agreement with the dense model's most likely token on wikitext2, per cent"]
    assert set(titles) < set(tables)
    assert tables["The dense model"][:2] == [["Perplexity on wikitext2", "24.5"], ["Perplexity on c4.jsonl", "31.5"]]
    assert tables["Settings in which the methods differ"] == [
        ["", "method", "allocation"], ["wanda", "wanda", "uniform"], ["alps", "alps", "uniform"],
        ["best", "best", "sensitivity"],
    ]  # fmt: skip


def test_the_head_says_on_what_it_was_measured(text: str) -> None:
    for wanted in (
        "owner/small: LlamaForCausalLM, bfloat16",
        "sha256 ab12ab12ab12",
        "c4.jsonl: 64 windows of 512 tokens (32,768 tokens), seed 1, sha256 1d1d1d1d1d1d",
        "wikitext2: 40 windows of 1024 tokens (40,920 predicted), sha256 0c0c0c0c0c0c",
        "piqa: 500 items, 0 shots, lm-eval 0.4.13",
        "Some CPU, 2 cores, 1 threads",
        "alps 0.1.0, torch 2.13.0",
        "1a2b3c4",
        "36 runs from the same weights: 3 methods, 6 patterns, 2 seeds",
    ):
        assert wanted in text, wanted


def test_lines_are_at_the_perplexities(results: list[Result], text: str) -> None:
    (drawing, _) = pictures(text, "Perplexity on wikitext2.")[:2]
    for place, method in enumerate(("wanda", "alps", "best")):
        found = re.findall(rf'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--s{place}\)', drawing)
        means = [
            statistics.mean(r.evaluations[0].perplexity for r in results if (r.method, r.pattern) == (method, p))
            for p in ("0.5", "0.6", "0.7", "0.8")
        ]
        points = sorted({(float(x), float(y)) for x, y in found})
        # The ends of the bars are drawn like points, above and below those of the means.
        heights = {x: sorted(y for other, y in points if other == x) for x, _ in points}
        middles = [ys[len(ys) // 2] for _, ys in sorted(heights.items())]
        assert len(middles) == 4
        logs = [math.log(mean) for mean in means]
        slope = (middles[3] - middles[0]) / (logs[3] - logs[0])
        for middle, log in zip(middles, logs, strict=True):
            assert middle == pytest.approx(middles[0] + slope * (log - logs[0]), abs=0.1)
            assert slope < 0, "larger is higher"
    assert f"alps: {format_number(means_of(results, 'alps', '0.5'))} at 0.5" in drawing and "Dense: 24.5." in drawing


def means_of(results: list[Result], method: str, pattern: str) -> float:
    return statistics.mean(r.evaluations[0].perplexity for r in results if (r.method, r.pattern) == (method, pattern))


def test_maps_have_the_colour_of_every_site(results: list[Result], text: str) -> None:
    assert Runs(results).patterns[0] == "0.7"
    shown = [r for r in results if r.pattern == "0.7" and r.seed == 0]
    errors = [site.error for r in shown for site in r.layers if site.error is not None]
    magnitude = [site.magnitude_error for site in shown[0].layers if site.magnitude_error is not None]
    norm = LogNorm(min(errors + magnitude), max(errors + magnitude))
    for result in shown:
        (drawing,) = pictures(text, f"{result.method}, 0.7: mean ")
        encoded = re.search(r"base64,([^\"]+)", drawing)
        assert encoded is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))).convert("RGB"), dtype=int)
        assert pixels.shape == (7, 4, 3)
        for site in result.layers:
            expected = np.array(colormaps["viridis"](norm(site.error or 0.0)), dtype=float)[:3] * 255
            assert np.abs(pixels[KINDS.index(site.kind), site.block] - expected).max() < 3
    assert "magnitude pruning on the inputs of wanda, 0.7" in text


def test_traces_show_the_restart_and_the_bound(results: list[Result], text: str) -> None:
    (result,) = [r for r in results if (r.method, r.pattern, r.seed) == ("alps", "0.7", 0)]
    traced = [site for site in result.layers if site.trace]
    drawings = pictures(text, "ρ · ‖W − D‖ / ‖W‖, which Theorem 1 bounds. " + traced[0].name)
    assert len(drawings) >= 1
    for site in traced:
        first, last = site.trace[0], site.trace[-1]
        begin, end = (format_number(check.gap * check.rho) for check in (first, last))
        wanted = f"{site.name}: {begin} at iteration 3, {end} at 90."
        assert any(wanted in drawing for drawing in drawings)
    for title in ("Penalty ρ", "‖W − D‖ / ‖W‖: distance", "Entries of the support", "Relative error of D"):
        (drawing, *_) = [d for d in pictures(text, title) if traced[0].name in d]
        assert drawing.count("stroke-dasharray: 1.2,2.4") == 1, "one site has begun anew"
        lines = [d for d in re.findall(r'<path d="([^"]*)" clip-path', drawing) if d.count("L") > 20]
        assert sorted(line.count("M") for line in lines) == [1, 1, 2], "and its line is broken there"


def test_every_drawing_is_described_with_figures_and_stands_alone(text: str) -> None:
    elements = Page(text).elements
    drawings = [attributes for tag, attributes in elements if tag == "svg"]
    described = [attributes for attributes in drawings if "aria-hidden" not in attributes]
    assert len(described) > 30
    assert all(a["role"] == "img" and re.search(r"\d", a["aria-label"]) for a in described)
    names = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(names) == len(set(names))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {one or other for one, other in used} <= set(names)
    assert "#0c0d0" not in text and "#0c0e0" not in text, "placeholders are variables by now"
    assert not re.search(r"\d\.\d{7,}", re.sub(r"base64,[^\"]*", "", text)), "never ten digits"


def leads_away(text: str) -> list[str]:
    """Addresses that a browser would ask for."""
    found = re.findall(r"url\(\s*['\"]?([^)'\"]*)", text) + re.findall(r"@import[^;]*", text)
    for _, attributes in Page(text).elements:
        found += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
    return [address for address in found if not address.startswith(("#", "data:"))]


def test_nothing_leads_away(text: str) -> None:
    assert leads_away(text) == []
    assert leads_away("<img src='http://x/y.png'><style>a { background: url(https://z/q) }</style><a href='/r'>") == [
        "https://z/q", "http://x/y.png", "/r",
    ]  # fmt: skip
    assert "http" not in text.replace("http-equiv", "")


EVIL = "<script>alert(1)</script>\" onload='x' {{ 7*7 }} $x$ &amp; 文 #0c0d09 --> "


def test_what_users_wrote_stays_text() -> None:
    more = {"model": f"owner/{EVIL}", "architecture": EVIL, "dtype": EVIL, "device": EVIL, "versions": {"torch": EVIL}}
    results = comparison(["alps", EVIL], ["0.5", "0.7", "2:4"], 2, 2, [EVIL], [EVIL], [EVIL], **more)
    for result in results:
        for site in result.layers:
            site.name, site.kind = f"{site.name}{EVIL}", f"{site.kind}{EVIL}"
    text = report_page(results, [EVIL])
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag in ("script", "b")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script" not in text and "{{ 7*7 }}" in text and "49" not in page.headings
    assert f"Perplexity on {EVIL} (dense 24.53)" in page.headings
    assert leads_away(text) == []


def test_the_same_results_give_the_same_bytes() -> None:
    script = (
        "import matplotlib, hashlib, alps.reporting.html_report as page\n"
        "from helpers import comparisons\n"
        "sizes = (['wanda', 'alps'], ['0.5', '0.7'], 2, 2)\n"
        "matplotlib.rcParams.update({'font.size': 30, 'axes.facecolor': 'red', 'svg.fonttype': 'path'})\n"
        "print(hashlib.sha256(page.report_page(comparisons.comparison(*sizes)).encode()).hexdigest())\n"
        "assert matplotlib.rcParams['font.size'] == 30 and 'matplotlib.pyplot' not in __import__('sys').modules"
    )
    # Another seed of hashes than this process has.
    environment = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    text = report_page(comparison(["wanda", "alps"], ["0.5", "0.7"], 2, 2))
    assert done.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()
    assert matplotlib.rcParams["font.size"] != 11


def sections(results: list[Result]) -> list[str]:
    text = report_page(results)
    for part in re.findall(r"<section>.*?</section>", text, flags=re.DOTALL):
        assert "<svg" in part or "<td" in part or "<blockquote" in part, "no empty panels"
    return [attributes["id"] for tag, attributes in Page(text).elements if tag == "h2"]


def test_a_panel_needs_data() -> None:
    everything = ["perplexity", "errors", "sparsity", "traces", "cost", "tables", "continuations"]
    assert sections(comparison(patterns=["0.5", "0.7"], blocks=1)) == everything
    assert sections(comparison(["wanda"], ["2:4"], 1, 1, [])) == ["perplexity", "errors", "cost", "tables"]
    bare: dict[str, object] = {"layers": [], "seconds": {}, "peak_host_bytes": 0, "peak_device_bytes": 0}
    assert sections([r.model_copy(update=bare) for r in comparison(["wanda"], ["0.5"], 1, 1, [])]) == [
        "perplexity", "tables",
    ]  # fmt: skip
    nothing = {**bare, "evaluations": [], "tasks": [], "mean_error": None}
    assert sections([r.model_copy(update=nothing) for r in comparison(["wanda"], ["0.5"], 1, 1, [])]) == []
    (dense,) = [r for r in comparison() if r.method == DENSE]
    assert sections([dense]) == ["continuations"]
    unmeasured = comparison(["magnitude"], ["0.5"], 1, 2, [])
    for result in unmeasured:
        result.mean_error = None
        for site in result.layers:
            site.error = site.magnitude_error = None
    assert sections(unmeasured) == ["perplexity", "cost", "tables"]


@pytest.mark.parametrize("methods", [1, 9, 20])
def test_any_number_of_methods_is_told_apart(methods: int) -> None:
    names = [f"alps+dense_target=0.{i}" for i in range(methods)]
    assert len({key.svg for key in line_keys(names)}) == len({key.svg for key in line_keys(names, False)}) == methods
    assert [key.name for key in line_keys(names)] == names


# Machado, Oliveira and Fernandes 2009, on linear sRGB, complete deficiencies: red, green and blue-blind.
BLIND = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)
# Ottosson's OKLab: cone responses of linear sRGB, and lightness and two opponents of their cube roots.
CONES = ((0.41222, 0.53633, 0.05145), (0.21190, 0.68070, 0.10740), (0.08830, 0.28172, 0.62998))
OPPONENTS = ((0.21045, 0.79362, -0.00407), (1.97800, -2.42859, 0.45059), (0.02590, 0.78277, -0.80868))


def linear(colour: str) -> NDArray[np.float64]:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def test_colours_are_told_apart_by_the_colour_blind_and_from_both_papers(text: str) -> None:
    palettes = [
        re.findall(r"--(s\d|paper): (#\w{6})", part) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    ]
    assert len(palettes) == 2
    for palette in palettes:
        paper, *series = [colour for _, colour in palette]
        assert len(set(series)) == 8
        shades = [float(linear(colour) @ (0.2126, 0.7152, 0.0722)) + 0.05 for colour in (paper, *series)]
        assert all(max(shade / shades[0], shades[0] / shade) >= 3 for shade in shades[1:])
        for eyes in BLIND:
            seen = [np.cbrt(np.array(CONES) @ np.clip(np.array(eyes) @ linear(colour), 0, 1)) for colour in series]
            places = [np.array(OPPONENTS) @ cones for cones in seen]
            assert min(np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]) > 0.06


def test_phases_are_counted_once() -> None:
    seconds = {"load": 2.0, "forward": 9.5, "gram": 4.0, "solve": 20.0, "admm": 14.5, "refit": 1.0, "total": 36.0}
    found = split_seconds(seconds)
    assert found == {"load": 2.0, "forward": 9.5, "gram": 4.0, "solve": 4.5, "admm": 14.5, "refit": 1.0, "other": 0.5}
    assert sum(split_seconds({"solve": 3.0, "sweep": 2.0}).values()) == 3.0


def test_figures_have_sensible_digits() -> None:
    found = [format_number(value) for value in (48965.123, 1000, 156.34, 24.53, 3.14159, 0.03321, 0.0)]
    assert found == ["48,965", "1,000", "156.3", "24.5", "3.14", "0.0332", "0"]
    assert [format_tick(value) for value in (0.001, 0.3, 20000, 1e6, 2e7, 5e-5)] == [
        "0.001", "0.3", "20,000", "10⁶", "2·10⁷", "5·10⁻⁵",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.05), (24, 62683), (0.0019, 0.385), (1e-9, 1e9), (64, 70), (0.1, 1.1)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= value <= high for value in ticks)
    assert all(value == pytest.approx(float(f"{value:.3g}"), rel=1e-9) for value in ticks)
    assert ticks == sorted(set(ticks)) and all(len(format_tick(value)) <= 7 for value in ticks)
