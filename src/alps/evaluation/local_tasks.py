"""Zero-shot tasks on local files: definitions, and reading of their items.

Each definition follows the task of the same name in EleutherAI's lm-evaluation-harness: same context, continuations
and metrics, so that equal items give equal accuracies. A file is named after its task, see `task_files` for its format
and `task_schemas` for its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alps.core.errors import ConfigError, did_you_mean, truncate
from alps.evaluation.task_files import read_items
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
    """Definition of a task: schemas of its items, and its configuration for lm-eval.

    Attributes:
        items: schemas, each of which checks a line and converts it to lm-eval's document; the fields of a line decide
            which one is used.
        config: lm-eval's output type, and the columns for text, target and choices.
        metrics: names in lm-eval's registry.
    """

    items: tuple[type[Item], ...]
    config: Mapping[str, str]
    metrics: tuple[str, ...]

    def item(self, row: Any) -> type[Item]:
        """Choose the schema whose fields are all in a line, or else the one with most of its fields in it."""
        fields = row.keys() if isinstance(row, dict) else ()

        def fit(item: type[Item]) -> tuple[bool, int]:
            count = sum(name in fields for name in item.model_fields)
            return count == len(item.model_fields), count

        return max(self.items, key=fit)


_CLOZE = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
}
# The choices are contexts, with one continuation: lm-eval expects an index as the text for that.
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
    """Read the first `limit` (or all) documents of a task's file; every line is checked.

    Raises:
        ConfigError: for a task without a definition, a file that is missing, empty or unreadable, or a line that is not
            an item of the task.
    """
    if task not in DEFINITIONS:
        raise ConfigError(
            f"Task '{task}' has no definition for local files; those with one are {', '.join(DEFINITIONS)}: "
            f"leave out --task-data to take it from lm-eval's own tasks.{did_you_mean(task, DEFINITIONS)}"
        )
    if not folder.is_dir():
        raise ConfigError(f"Task data '{folder}' is not a directory: give the folder that holds {task}.jsonl.")
    path, rows = read_items(task, folder)
    documents = [_document(task, path, number, row) for number, row in rows]
    if not documents:
        raise ConfigError(f"Task data '{path}' is empty: give at least one item.")
    return documents[:limit]


def _document(task: str, path: Path, number: int, row: Any) -> Document:
    item = DEFINITIONS[task].item(row)
    try:
        return item.model_validate(row).document()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        reason = f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
        remedy = ""
        if first["type"] == "missing" and isinstance(row, dict):
            expected = ", ".join(item.model_fields)
            remedy = f": it has the fields {truncate(', '.join(map(str, row)))}, and {expected} are expected"
        raise ConfigError(f"Line {number} of '{path}' is not an item of {task} ({reason}){remedy}.") from None
