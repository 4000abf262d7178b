"""The page in a real browser: silent, alone, inside its window, readable in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from alps.reporting.html_report import report_page
from helpers.browser import Browser
from helpers.comparisons import comparison


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    methods = ["magnitude", "wanda", "sparsegpt", "alps+true_sequential+dense_target=0.4+calibration=self", "best"]
    path.write_text(report_page(comparison(methods, prompts=["<b>Once</b>", "x" * 300])))
    return path


def test_nothing_is_complained_of_and_nothing_asked_for(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.complaints == []
    own, *others = browser.requests
    assert own == page.as_uri() and all(address.startswith("data:") for address in others)
    assert len(others) >= 10, "the maps are images"
    assert browser.run("[...document.images].length + document.querySelectorAll('script').length") == 0
    text = browser.run("document.body.innerText")
    for wanted in ("owner/small", "24.5", "Perplexity on wikitext2 (dense 24.53)", "<b>Once</b>", "ab12ab12ab12"):
        assert wanted in text
    figures = browser.run("[...document.querySelectorAll('svg text')].map(t => t.textContent).join(' ')")
    for wanted in ("dense 24.5", "50 %", "0.1", "36.0 s", "3.25 / 5 GiB", "down"):
        assert wanted in figures


BROKEN = {
    "an exception": ("<script>throw new Error('oops')</script>", "oops"),
    "a complaint": ("<script>console.error('alas')</script>", "alas"),
    "an image from elsewhere": ("<img src='http://example.org/x.png'>", "ERR_NAME_NOT_RESOLVED"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_finds(browser: Browser, tmp_path: Path, what: str) -> None:
    body, complaint = BROKEN[what]
    path = tmp_path / "broken.html"
    path.write_text(f"<!doctype html><link rel=icon href='data:,'><body>{body}")
    browser.open(path)
    assert any(complaint in text for text in browser.complaints)
    assert ("http://example.org/x.png" in browser.requests) == ("img" in body)


def test_the_policy_of_the_page_refuses_scripts_and_strangers(browser: Browser, page: Path, tmp_path: Path) -> None:
    path = tmp_path / "attacked.html"
    inside = "<script>document.title = 'gone'</script><img src='http://example.org/x.png'>"
    path.write_text(page.read_text().replace("<main>", f"<main>{inside}"))
    browser.open(path)
    assert sum("Content Security Policy" in text for text in browser.complaints) >= 2
    assert "owner/small" in browser.run("document.title")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_only_tables_are_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')"
    assert (
        browser.run(f"{wide} && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 90))")
        == []
    )
    # Letters of a figure keep lines of 9 pixels and more.
    size = "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
    assert browser.run(size) >= 9


_LETTERS = """
(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const wrong = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const all = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    const whole = svg.getBoundingClientRect();
    for (const [name, box] of all)
      if (box.left < whole.left - 8 || box.right > whole.right + 8 || box.top < whole.top - 4
          || box.bottom > whole.bottom + 4)
        wrong.push('outside: ' + name);
    for (let i = 0; i < all.length; i++)
      for (let j = 0; j < i; j++) {
        const [a, b] = [all[i][1], all[j][1]];
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1 && y > 4) wrong.push('over each other: ' + all[i][0] + ' and ' + all[j][0]);
      }
  }
  return wrong;
})()
"""


def test_no_letters_are_cut_off_or_over_each_other(browser: Browser, page: Path, tmp_path: Path) -> None:
    for width in (390, 1280):
        browser.open(page, width)
        assert browser.run(_LETTERS) == []
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r'(<text [^>]*) x="[^"]*"', r'\1 x="355"', page.read_text()))
    browser.open(broken)
    found = browser.run(_LETTERS)
    assert any("outside" in one for one in found) and any("over each other" in one for one in found)


def _contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_everything_stands_out_from_the_paper(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert _contrast(paper, "rgb(0, 0, 0)" if dark else "rgb(255, 255, 255)") < 1.3
    written = "p, td, th, dt, dd, figcaption small, strong, a, summary"
    letters = f"new Set([...document.querySelectorAll('{written}')].map(e => getComputedStyle(e).color))"
    drawn = "new Set([...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill))"
    for colours, least in ((letters, 4.5), (drawn, 4.5)):
        found = browser.run(f"[...{colours}]")
        assert found and all(_contrast(paper, colour) >= least for colour in found), (paper, found)
    paths = "[...document.querySelectorAll('#perplexity ~ .pictures path')].map(e => getComputedStyle(e).stroke)"
    lines = browser.run(f"[...new Set({paths})]")
    strong = [colour for colour in lines if colour.startswith("rgb") and _contrast(paper, colour) >= 3]
    assert len(strong) >= 5, "a colour for each of the five methods"


@pytest.mark.slow
def test_a_hundred_runs_are_there_at_once(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    results = comparison(
        ["magnitude", "wanda", "sparsegpt", "alps", "best"], ["0.5", "0.6", "0.7", "0.8", "2:4"], seeds=4, blocks=30
    )
    assert len(results) == 101 and all(len(result.layers) == 210 for result in results[1:])
    path.write_text(report_page(results))
    assert path.stat().st_size < 3_000_000
    milliseconds = []
    for _ in range(3):
        browser.open(path)
        milliseconds.append(browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    # 0.4 s were measured on one core with four other jobs; a second is what is wanted, a busy machine is given three.
    assert 0 < min(milliseconds) < 3000
