"""The pages of docs/reference that are generated from the code are those of the code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alps.reporting.records import Record
from helpers.command_line_page import command_line_page
from helpers.report_json_page import descriptions, report_json_page

_FOLDER = Path(__file__).parent.parent / "docs" / "reference"
_PAGES = {"command-line": command_line_page, "report-json": report_json_page}


@pytest.mark.parametrize(("name", "generate"), _PAGES.items(), ids=_PAGES)
def test_the_page_is_that_of_the_code(name: str, generate: Callable[[], str]) -> None:
    generator = f"tests/helpers/{name.replace('-', '_')}_page.py"
    assert (_FOLDER / f"{name}.md").read_text() == generate(), f"run python {generator} > docs/reference/{name}.md"


def test_a_field_without_a_meaning_is_refused() -> None:
    class Half(Record):
        """A record.

        Attributes:
            first: has a meaning.
        """

        first: int
        second: int

    with pytest.raises(AssertionError, match=r"Half: describe {'second'}"):
        descriptions(Half)
