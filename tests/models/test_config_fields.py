"""Tests of changes of single fields in the text of a JSON object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alps.models.config_fields import replace_fields

_FIELDS: dict[str, Any] = {"a": 1, "text": 'with "quotes", {braces}', "b": [1, 2], "part": {"a": 5}, "c": 1e-06}


@pytest.mark.parametrize("layout", [{"indent": 2}, {"indent": 4}, {}, {"separators": (",", ":")}, {"indent": "\t"}])
def test_values_change_and_new_names_come_last(layout: dict[str, Any]) -> None:
    text = json.dumps(_FIELDS, **layout)
    changes = {"a": 7, "b": ["x", "y", "z"], "d": None, "e": False}
    assert json.loads(replace_fields(text, changes)) == {**_FIELDS, **changes}
    assert list(json.loads(replace_fields(text, changes))) == [*_FIELDS, "d", "e"]
    assert replace_fields(text, {}) == text


def test_every_other_byte_stays() -> None:
    text = '\n{  "a" :1 ,\r\n\t"nested": {"a": 2}, "ab":[ 1,2 ],"z": 1.50}\n\n'
    assert replace_fields(text, {"a": 30}) == text.replace(":1 ,", ":30 ,")
    assert replace_fields(text, {"z": 2, "ab": [3]}) == text.replace("1.50", "2").replace("[ 1,2 ]", "[3]")


def test_the_layout_is_that_of_transformers() -> None:
    before = {"layers": ["full", "sliding"], "n": 2}
    after = {"layers": ["full"], "n": 1, "size": 8, "kinds": [1, 2]}
    assert replace_fields(json.dumps(before, indent=2), after) == json.dumps(after, indent=2)


def test_an_empty_object_takes_fields() -> None:
    assert json.loads(replace_fields("{}", {"a": 1, "b": 2})) == {"a": 1, "b": 2}
