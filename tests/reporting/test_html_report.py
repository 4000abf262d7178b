"""The page's figures are those of the results; it holds what there is data for, and nothing that is not its own."""

from __future__ import annotations

import hashlib
import math
import os
import re
import statistics
import subprocess
import sys

import matplotlib

from alps.reporting.compare_results import DENSE, Result
from alps.reporting.html_report import report_page
from alps.reporting.run_report import STRUCTURED
from helpers.comparisons import comparison, measured_result
from helpers.html_page import Page


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


def test_a_shrunk_model_is_not_called_pruned_to_a_sparsity() -> None:
    text = report_page([measured_result(STRUCTURED, "0%")])
    assert "Shrunk by structured pruning" in text and "Pruned to 0%" not in text


def test_perplexities_that_no_number_holds_are_left_out_of_figures() -> None:
    """The page of a comparison with a collapsed run, with nothing but such runs, and with a collapsed dense model."""
    good, bad = measured_result("b", perplexity=30.0), measured_result("a", perplexity=math.inf)
    dense = measured_result("dense", "", None)
    text = report_page([dense, bad, good])
    assert "b has perplexity 30.0 on t" in text and "loss" not in text.split("<svg")[0].lower()
    assert "inf" not in text.lower().replace("infer", "").replace("information", "")
    for results in ([dense, bad], [measured_result("dense", "", None, math.inf), bad, good]):
        assert report_page(results)
    assert "loss 1.0" in report_page([measured_result("dense", "", None, math.inf), bad, good])
