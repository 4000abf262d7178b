"""The site of the documentation: it builds, refuses links that lead nowhere, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alps

pytest.importorskip("zensical", exc_type=ImportError)
pytestmark = pytest.mark.site

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy what the site is built from."""
    for folder in ("docs", ".ci"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("zensical.toml", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    return tmp_path


def build(root: Path) -> subprocess.CompletedProcess[str]:
    """Build the site; the text of the result is without colours."""
    done = subprocess.run([sys.executable, ".ci/build-docs"], cwd=root, capture_output=True, text=True, check=False)
    done.stdout = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    return done


def test_every_page_is_built_and_loads_nothing_from_elsewhere() -> None:
    done = build(ROOT)
    assert done.returncode == 0 and "griffe:" not in done.stdout, done.stdout
    site = ROOT / "build" / "site"
    sources = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")]
    pages = {path.relative_to(site) for path in site.rglob("*.html")}
    assert {path.relative_to(ROOT / "docs").with_suffix(".html") for path in sources} <= pages
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        # The placeholder of the address, in canonical links.
        assert [address for address in loaded if not address.startswith("https://example.org/alps/")] == [], page


def test_the_reference_of_the_functions_has_signatures_and_arguments() -> None:
    if not (ROOT / "build" / "site").is_dir():
        build(ROOT)
    page = (ROOT / "build" / "site" / "reference" / "python.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert ":::" not in text
    assert "share of the weights to remove from every linear layer" in text and "sparsity: float | None = None" in text
    for name in set(alps.__all__) - {"METHODS", "__version__", "AlpsError"}:
        assert re.search(rf'id="alps(\.\w+)*\.{name}"', page), name


def test_the_changelog_is_a_page_with_links_to_pages() -> None:
    if not (ROOT / "build" / "site").is_dir():
        build(ROOT)
    page = (ROOT / "build" / "site" / "project" / "changelog.html").read_text()
    assert "Unreleased" in page or "0.1.0" in page
    assert "docs/" not in "".join(re.findall(r'href="([^"]*)"', page))


def test_links_that_lead_nowhere_are_refused(clone: Path) -> None:
    with (clone / "docs" / "index.md").open("a") as page:
        page.write("\n[page](how-to/gone.md)\n[heading](how-to/presets.md#gone)\n[heading of this page](#gone)\n")
    done = build(clone)
    assert done.returncode != 0 and not (clone / "build" / "site").exists()
    assert "3 issues found" in done.stdout and done.stdout.count("[ index.md:") == 3
