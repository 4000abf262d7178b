"""What a user can get wrong, or a model can be: one sentence each, with what, where and the remedy.

The command line turns every `AlpsError` into one line on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlpsError(Exception):
    """Base of all errors that are the user's to mend; the message is complete without a traceback."""


class ConfigError(AlpsError):
    """A setting, path or text that cannot be used as given."""


class UnsupportedModel(AlpsError):
    """A model whose blocks or sites cannot be found or pruned."""


class SolveFailed(AlpsError):
    """A layer problem without a usable answer; names the site and the remedy."""


class CheckpointError(AlpsError):
    """A directory that cannot be read as a checkpoint or must not be written to."""


class RankLost(AlpsError):
    """Another process of the run has ended or does not answer; says which, where, and what it said last."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line of at most 160 characters without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


def truncate(word: object) -> str:
    """A name or value that a user gave, in at most 200 characters."""
    text = str(word)
    return text if len(text) <= 200 else f"{text[:190]}..."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `choices`, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_known(what: str, word: object, choices: Iterable[str]) -> None:
    """Refuse a word that is none of `choices`.

    Args:
        what: it is, as a sentence begins: `Budget`.

    Raises:
        ConfigError: naming the choices, and the nearest of them.
    """
    known = list(choices)
    if word not in known:
        near = did_you_mean(str(word), known)
        raise ConfigError(f"{what} '{truncate(word)}' is unknown: choose one of {', '.join(known)}.{near}")
