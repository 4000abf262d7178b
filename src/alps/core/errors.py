"""Errors that a user can correct, each with a message of one sentence: what is wrong, where, and what to do.

The command line prints every `AlpsError` as one line on stderr and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlpsError(Exception):
    """Base of all errors that a user can correct; the message is complete without a traceback."""


class ConfigError(AlpsError):
    """A setting, path or text that cannot be used."""


class UnsupportedModel(AlpsError):
    """A model whose blocks or layers cannot be found or pruned."""


class SolveFailed(AlpsError):
    """A layer problem without a usable solution; the message names the layer and the remedy."""


class NotFinite(AlpsError):
    """A model that computes NaN or infinite logits; the message names the window and the first block."""


class CheckpointError(AlpsError):
    """A directory that cannot be read as a checkpoint or must not be written to."""


class RankLost(AlpsError):
    """Another process of the run has ended or hangs; the message names its rank, the stage, and its error if known."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 160 characters, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


def truncate(value: object) -> str:
    """Return a name or value that a user gave as text of at most 200 characters."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:190]}..."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `choices`, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of `choices`.

    Args:
        name: name of the setting, capitalised, with which the message begins.
        value: to check.
        choices: the valid values.

    Raises:
        ConfigError: listing the choices, and the nearest of them.
    """
    valid = list(choices)
    if value not in valid:
        hint = did_you_mean(str(value), valid)
        raise ConfigError(f"{name} '{truncate(value)}' is unknown: choose one of {', '.join(valid)}.{hint}")
