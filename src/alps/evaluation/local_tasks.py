"""Zero-shot tasks on local files: how their items are read and scored.

Each definition follows the task of the same name in EleutherAI's lm-evaluation-harness: the same context,
continuations and metrics, so that the same items give the same accuracies. A file is named after its task and holds
one JSON object a line, see `items`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alps.core.errors import ConfigError, did_you_mean
from alps.data.text_sources import read_json_lines
from alps.evaluation.task_schemas import (
    ArcItem,
    BoolqItem,
    Document,
    HellaswagItem,
    Item,
    LambadaItem,
    MmluItem,
    OpenbookqaItem,
    PiqaItem,
    RawHellaswagItem,
    RteItem,
    WinograndeItem,
)


@dataclass(frozen=True)
class Definition:
    """How a task's items are read and scored.

    Attributes:
        items: each checks a line and makes lm-eval's document of it; which one is told by the fields of the line.
        config: lm-eval's output type, and which column is the text, the target and the choices.
        metrics: names, in lm-eval's own registry.
    """

    items: tuple[type[Item], ...]
    config: Mapping[str, str]
    metrics: tuple[str, ...]

    def item(self, row: Any) -> type[Item]:
        """The class whose fields are all in a line, or else the one with most of its fields in it."""
        fields = row.keys() if isinstance(row, dict) else ()

        def fit(item: type[Item]) -> tuple[bool, int]:
            found = sum(name in fields for name in item.model_fields)
            return found == len(item.model_fields), found

        return max(self.items, key=fit)


_CLOZE = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
}
# The choices are contexts here and the continuation is one: lm-eval takes an index as text for that.
_CONTEXTS = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_target": "continuation",
    "doc_to_choice": "contexts",
}

_ACC, _BOTH = ("acc",), ("acc", "acc_norm")

DEFINITIONS = {
    "lambada_openai": Definition((LambadaItem,), _CLOZE, ("perplexity", "acc")),
    "piqa": Definition((PiqaItem,), _CHOICE, _BOTH),
    "arc_easy": Definition((ArcItem,), _CHOICE, _BOTH),
    "arc_challenge": Definition((ArcItem,), _CHOICE, _BOTH),
    "hellaswag": Definition((HellaswagItem, RawHellaswagItem), _CHOICE, _BOTH),
    "winogrande": Definition((WinograndeItem,), _CONTEXTS, _ACC),
    "boolq": Definition((BoolqItem,), _CHOICE, _ACC),
    "rte": Definition((RteItem,), _CHOICE, _ACC),
    "openbookqa": Definition((OpenbookqaItem,), _CHOICE, _BOTH),
    "mmlu": Definition((MmluItem,), _CHOICE, _ACC),
}


def read_documents(task: str, folder: Path, limit: int | None = None) -> list[Document]:
    """The first `limit` (or all) documents of a task's file; every line is checked.

    Raises:
        ConfigError: for a task without a definition here, a file that is missing, empty or unreadable, or a line that
            is not such an item.
    """
    if task not in DEFINITIONS:
        raise ConfigError(
            f"Task '{task}' has no definition for local files, only {', '.join(DEFINITIONS)} have: "
            f"leave out --task-data to take it from lm-eval's own tasks.{did_you_mean(task, DEFINITIONS)}"
        )
    if not folder.is_dir():
        raise ConfigError(f"Task data '{folder}' is not a directory: give the folder that holds {task}.jsonl.")
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise ConfigError(f"Task '{task}' needs its items in '{path}', which does not exist.")
    documents = [_document(task, path, number, row) for number, row in read_json_lines(path)]
    if not documents:
        raise ConfigError(f"Task data '{path}' is empty: give at least one item.")
    return documents[:limit]


def _document(task: str, path: Path, number: int, row: Any) -> Document:
    try:
        return DEFINITIONS[task].item(row).model_validate(row).document()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"Line {number} of '{path}' is not an item of {task} ({reason}).") from None
