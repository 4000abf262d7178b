"""Parts of messages: first lines, shortened values, the nearest choice."""

from __future__ import annotations

import pytest

from alps.core.errors import AlpsError, ConfigError, RankLost, check_choice, did_you_mean, first_line, truncate


def test_every_error_of_the_package_is_an_alps_error() -> None:
    assert issubclass(ConfigError, AlpsError) and issubclass(RankLost, AlpsError)
    assert not issubclass(AlpsError, ValueError | RuntimeError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No space left.\nat line 3"), "No space left"),
        (ValueError("  \n broken...  \n"), "broken"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 300), "x" * 160),
    ],
)
def test_the_first_line_of_an_error_is_short_and_without_a_full_stop(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_long_values_are_cut() -> None:
    assert truncate("a" * 200) == "a" * 200
    assert truncate("a" * 201) == "a" * 190 + "..."
    assert truncate(1.5) == "1.5"


def test_the_nearest_choice_is_suggested_and_no_far_one() -> None:
    assert did_you_mean("wnada", ["wanda", "alps"]) == " Did you mean 'wanda'?"
    assert did_you_mean("xyzzy", ["wanda", "alps"]) == ""
    check_choice("Method", "alps", ["wanda", "alps"])
    with pytest.raises(ConfigError) as caught:
        check_choice("Method", "wnada", iter(["wanda", "alps"]))
    assert str(caught.value) == "Method 'wnada' is unknown: choose one of wanda, alps. Did you mean 'wanda'?"
