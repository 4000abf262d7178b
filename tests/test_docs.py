"""The pages of docs name files, pages and headings that exist."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Paths in pages are relative to one of these.
FOLDERS = (ROOT, ROOT / "src" / "alps", *sorted(path for path in (ROOT / "docs").rglob("*") if path.is_dir()))


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> list[str]:
    """List the source files that a page names with their folder, and that do not exist."""
    paths = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|c|h|yaml|md|sh))`", text)
    return [path for path in paths if not any((folder / path).is_file() for folder in FOLDERS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^):]*\.md)?(?:#([^)]+))?\)", page.read_text())
    for target, anchor in links:
        linked = page.parent / target if target else page
        assert linked.is_file(), target
        assert not anchor or anchor in heading_anchors(linked), (target, anchor)
    assert links or page.name != "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert missing_paths(page.read_text()) == []


def test_missing_files_are_found() -> None:
    text = "`solvers/admm.py`, `tests/test_docs.py`, `solvers/gone.py`, `plain.py`"
    assert missing_paths(text) == ["solvers/gone.py"]


def test_pages_that_the_code_names_exist() -> None:
    sources = [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"docs/([\w/-]+\.md)", path.read_text())}
    assert {name for name in named if not (ROOT / "docs" / name).is_file()} == set()
    assert {"reference/settings.md", "explanation/experts.md"} <= named


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, pages = set[Path](), [ROOT / "README.md"]
    while pages:
        page = pages.pop()
        links = re.findall(r"\]\(([^):#]+\.md)(?:#[^)]+)?\)", page.read_text())
        linked = {(page.parent / link).resolve() for link in links} - reached
        reached |= linked
        pages.extend(linked)
    assert [page.name for page in PAGES[1:] if page.resolve() not in reached] == []


def test_the_page_of_current_figures_stays_short_and_free_of_commits() -> None:
    text = (ROOT / "docs" / "project" / "benchmarks.md").read_text()
    assert len(text.splitlines()) <= 200
    assert re.findall(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b", text) == []
    assert text.count("```sh") >= text.count("\n## ")


def listed_pages(entry: Any) -> Iterator[str]:
    """Yield the pages of a part of the site's navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry if isinstance(entry, list) else entry.values():
            yield from listed_pages(part)


def test_the_site_lists_every_page_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    # Files of the root become pages when the site is built.
    roots = {f"project/{name}.md" for name in ("changelog", "code-of-conduct", "contributing", "security")}
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:]} | roots
    assert sorted(listed_pages(nav)) == sorted(pages), "mend nav in zensical.toml"


_EXPLANATION = ["Problem", "Idea", "Formula", "Cost", "Gain", "Limits", "In the code"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "explanation").glob("*.md")), ids=lambda page: page.name)
def test_pages_of_explanation_follow_one_order(page: Path) -> None:
    if page.name in ("architecture.md", "index.md"):
        return
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == _EXPLANATION
    parts = dict(re.findall(r"^## ([^\n]+)\n\n(.+?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert len(re.split(r"[.] +(?=[A-Z`])", " ".join(parts["Idea"].split("\n\n")[0].split()))) <= 2
    assert "\n|--" in parts["Gain"] and "](" in parts["Gain"]
    assert re.search(r"`[a-z_]+/[a-z_]+\.py`", parts["In the code"])


def long_lines(text: str) -> list[str]:
    """List the lines of prose above 120 columns; tables and code may be wider."""
    prose = re.sub(r"^```.*?^```$|^\|.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in prose.splitlines() if len(line) > 120]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(page: Path) -> None:
    # The generator of this page writes a paragraph a line.
    assert page.name == "report-json.md" or long_lines(page.read_text()) == []
