"""Text sources: files, the standard corpora of the hub, and the documentation inside CPython.

A source is a list of rows. Calibration joins rows by the tokenizer's document separator, evaluation by a blank line, as
in the literature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alps.core.errors import ConfigError, did_you_mean
from alps.data.arrow_texts import iterate_records, looks_like_arrow
from alps.data.byte_streams import inspect_bytes
from alps.data.hub_corpora import HUB_CORPORA, read_hub_corpus
from alps.data.json_texts import read_json_values
from alps.data.text_files import PLAIN, read_text_file

Split = Literal["calibration", "evaluation"]
# Name of the calibration by windows that the dense model samples; see `alps.data.mixture`.
SELF = "self"


@dataclass(frozen=True)
class Origin:
    """Format and number of documents of a text."""

    format: str
    documents: int


@dataclass(frozen=True)
class Text:
    """Rows of text, a name for tables and reports, and the format in words."""

    name: str
    rows: list[str]
    format: str = field(default=PLAIN, compare=False)

    @property
    def origin(self) -> Origin:
        """Format, and number of rows with some text."""
        return Origin(self.format, sum(not row.isspace() for row in self.rows if row))

    @property
    def joined(self) -> str:
        """The rows joined by a blank line."""
        return "\n\n".join(self.rows)


def load_text(spec: str, split: Split) -> Text:
    """Load a text by path or name.

    Args:
        spec: a file of any format of `alps.data.text_files`, a folder that `save_to_disk` wrote, `wikitext2`, `c4`,
            `ptb` or `python-docs`, or `wikitext2:PATH` for a local copy of WikiText-2.
        split: part of a named corpus; a file has only one.

    Raises:
        ConfigError: when the text cannot be found or read, or is empty.
    """
    if spec in _CORPORA:
        text = Text(spec, _CORPORA[spec](split), "Python's topics" if spec == "python-docs" else "data set of the hub")
    elif spec.startswith("wikitext2:"):
        path = _existing_file(spec.removeprefix("wikitext2:"), spec, split)
        file = read_text_file(path)
        rows = _wikitext_rows(file.rows[0]) if file.is_plain else file.rows
        text = Text(f"wikitext2:{path.name}", rows, file.format)
    else:
        path = _existing_file(spec, spec, split)
        file = read_text_file(path)
        text = Text(path.name, file.rows, file.format)
    if not any(row.strip() for row in text.rows):
        raise ConfigError(f"Text '{spec}' is empty: give a file with some text in it.")
    return text


def _existing_file(name: str, spec: str, split: Split) -> Path:
    path = Path(name).expanduser()
    try:
        exists = path.is_file() or (bool(name) and path.is_dir())
    except (OSError, ValueError):  # too long for a path, a NUL byte
        exists = False
    if not exists:
        names = [*_CORPORA, *([SELF] if split == "calibration" else [])]
        raise ConfigError(f"Text '{spec}' is neither a file nor one of {', '.join(names)}.{did_you_mean(spec, names)}")
    return path


def read_records(path: Path) -> list[tuple[int, Any]]:
    """Return the values of a JSON, parquet or Arrow file with their line or row numbers; blank lines are skipped.

    Raises:
        ConfigError: for a file that cannot be read, or is not JSON.
    """
    file = inspect_bytes(path)
    if looks_like_arrow(file.head):
        return list(iterate_records(path))
    return list(read_json_values(file)[0])


def _wikitext_rows(text: str) -> list[str]:
    """Split the raw WikiText-2 file into the rows of its `datasets` version.

    Every row keeps its newline; a row of one space becomes empty.
    """
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return ["" if line == " \n" else line for line in lines if line]


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
    return lambda split: read_hub_corpus(corpus, split == "calibration")


_CORPORA: dict[str, Callable[[Split], list[str]]] = {
    **{name: _hub_corpus(name) for name in HUB_CORPORA},
    "python-docs": _python_docs,
}
