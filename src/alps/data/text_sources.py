"""Text sources: files, JSON lines, the standard corpora (by `datasets`), and the documentation inside CPython.

A source is a list of rows. Calibration joins rows by the tokenizer's document separator, evaluation by a blank line, as
in the literature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alps.core.errors import ConfigError, did_you_mean

Split = Literal["calibration", "evaluation"]
# Name of the calibration by windows that the dense model samples; see `alps.data.mixture`.
SELF = "self"


@dataclass(frozen=True)
class Text:
    """Rows of text, and a name for tables and reports."""

    name: str
    rows: list[str]

    @property
    def joined(self) -> str:
        """The rows joined by a blank line."""
        return "\n\n".join(self.rows)


def load_text(spec: str, split: Split) -> Text:
    """Load a text by path or name.

    Args:
        spec: a `.jsonl` file with a `text` field in every line, any other text file, `wikitext2`, `c4`, `ptb` or
            `python-docs`, or `wikitext2:PATH` for a local copy of the raw WikiText-2 file.
        split: part of a named corpus; a file has only one.

    Raises:
        ConfigError: when the text cannot be found or read, or is empty.
    """
    if spec in _CORPORA:
        text = Text(spec, _CORPORA[spec](split))
    elif spec.startswith("wikitext2:"):
        path = _existing_file(spec.removeprefix("wikitext2:"), spec, split)
        text = Text(f"wikitext2:{path.name}", _wikitext_rows(_read(path)))
    else:
        path = _existing_file(spec, spec, split)
        text = Text(path.name, _json_rows(path) if path.suffix == ".jsonl" else [_read(path)])
    if not any(row.strip() for row in text.rows):
        raise ConfigError(f"Text '{spec}' is empty: give a file with some text in it.")
    return text


def _existing_file(name: str, spec: str, split: Split) -> Path:
    path = Path(name).expanduser()
    try:
        exists = path.is_file()
    except OSError:  # too long for a path
        exists = False
    if not exists:
        names = [*_CORPORA, *([SELF] if split == "calibration" else [])]
        raise ConfigError(f"Text '{spec}' is neither a file nor one of {', '.join(names)}.{did_you_mean(spec, names)}")
    return path


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Text '{path}' is not UTF-8 (byte {error.start}): give a plain text file.") from None
    except OSError as error:
        raise ConfigError(f"Text '{path}' cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise ConfigError(f"Text '{path}' holds NUL bytes: it is not a plain text file.")
    return text


def read_json_lines(path: Path) -> list[tuple[int, Any]]:
    """Return the values of a JSON lines file with their line numbers; blank lines are skipped.

    Raises:
        ConfigError: for a file that cannot be read, or a line that is not JSON.
    """
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"Line {number} of '{path}' is not JSON: every line must be an object.") from None
        rows.append((number, row))
    return rows


def _json_rows(path: Path) -> list[str]:
    rows = []
    for number, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ConfigError(f"Line {number} of '{path}' has no string field 'text'.")
        if not row["text"].isprintable() and any("\ud800" <= letter <= "\udfff" for letter in row["text"]):
            raise ConfigError(f"Line {number} of '{path}' holds half of a surrogate pair: it is not Unicode text.")
        rows.append(row["text"])
    return rows


def _wikitext_rows(text: str) -> list[str]:
    """Split the raw WikiText-2 file into the rows of its `datasets` version.

    Every row keeps its newline; a row of one space becomes empty.
    """
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return ["" if line == " \n" else line for line in lines if line]


def _hub_rows(corpus: str, split: Split) -> list[str]:
    """Load a standard corpus from the hub."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"Text '{corpus}' needs the package datasets: run pip install 'alps-prune[datasets]', or give a text file."
        ) from None
    calibrating = split == "calibration"
    part = "train" if calibrating else ("validation" if corpus == "c4" else "test")
    shard = "en/c4-train.00000-of-01024.json.gz" if calibrating else "en/c4-validation.00000-of-00008.json.gz"
    arguments: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
        "wikitext2": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": part}),
        "c4": (("allenai/c4",), {"data_files": {part: shard}, "split": part}),
        "ptb": (("ptb-text-only/ptb_text_only", "penn_treebank"), {"split": part}),
    }
    positional, keywords = arguments[corpus]
    try:
        rows = datasets.load_dataset(*positional, **keywords)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"Text '{corpus}' cannot be fetched from the hub ({reason}): give a local file.") from error
    return list(rows["sentence" if corpus == "ptb" else "text"])


def _python_docs(split: Split) -> list[str]:
    """Return the language reference that CPython ships for `help()`; a third of its topics is held out for evaluation.

    Topics share paragraphs. One that occurs in a held-out topic is removed from the calibration topics.
    """
    from pydoc_data.topics import topics

    def held_out(topic: str) -> bool:
        return hashlib.sha256(topic.encode()).digest()[0] % 3 == 0

    evaluation = [topics[topic] for topic in sorted(topics) if held_out(topic)]
    if split == "evaluation":
        return evaluation
    held_out_paragraphs = {paragraph.strip() for text in evaluation for paragraph in text.split("\n\n")}
    others = [topics[topic].split("\n\n") for topic in sorted(topics) if not held_out(topic)]
    return ["\n\n".join(part for part in text if part.strip() not in held_out_paragraphs) for text in others]


def _hub_corpus(corpus: str) -> Callable[[Split], list[str]]:
    return lambda split: _hub_rows(corpus, split)


_CORPORA: dict[str, Callable[[Split], list[str]]] = {
    "wikitext2": _hub_corpus("wikitext2"),
    "c4": _hub_corpus("c4"),
    "ptb": _hub_corpus("ptb"),
    "python-docs": _python_docs,
}
