"""Pages taken apart: elements, tables and drawings."""

from __future__ import annotations

import re
from html.parser import HTMLParser


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
