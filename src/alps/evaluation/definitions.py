"""Zero-shot tasks on local files: the fields of an item, and the prompt and choices that lm-eval makes of them.

Each definition follows the task of the same name in EleutherAI's lm-evaluation-harness (version 1.0 of each): the
same context, continuations and metrics, so that the same items give the same accuracies. A file is named after its
task and holds one JSON object a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alps.data.text import read_json_lines
from alps.errors import ConfigError, did_you_mean

Document = dict[str, Any]


class Item(BaseModel):
    """One line of a task's file; fields that no prompt needs are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    def document(self) -> Document:
        """What lm-eval is given: the columns that the task's configuration names."""
        raise NotImplementedError


class LambadaItem(Item):
    """A passage whose last word is to be predicted."""

    text: str = Field(pattern=r"(?s)^.+ [^ ]+$")

    def document(self) -> Document:
        context, _, word = self.text.rpartition(" ")
        return {"context": context, "continuation": f" {word}"}


class PiqaItem(Item):
    """A goal and two ways to reach it; `label` is the index of the right one."""

    goal: str
    sol1: str
    sol2: str
    label: int = Field(ge=0, le=1)

    def document(self) -> Document:
        return _question(self.goal, [self.sol1, self.sol2], self.label)


class ArcChoices(Item):
    """Answers and their labels, in the same order."""

    text: list[str] = Field(min_length=2)
    label: list[str]


class ArcItem(Item):
    """A question, its answers and the label of the right one."""

    question: str
    choices: ArcChoices
    answerKey: str  # noqa: N815 (the name in the data)

    @model_validator(mode="after")
    def _key_is_a_label(self) -> ArcItem:
        if len(self.choices.text) != len(self.choices.label) or self.choices.label.count(self.answerKey) != 1:
            raise ValueError("answerKey is not exactly one of the labels, or there are not as many labels as texts")
        return self

    def document(self) -> Document:
        return _question(self.question, self.choices.text, self.choices.label.index(self.answerKey))


class HellaswagItem(Item):
    """An item of HellaSwag as lm-eval preprocesses it: a beginning, its endings, the index of the right one."""

    query: str
    choices: list[str] = Field(min_length=2)
    gold: int = Field(ge=0)

    @model_validator(mode="after")
    def _gold_is_a_choice(self) -> HellaswagItem:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold {self.gold} is not the index of one of {len(self.choices)} choices")
        return self

    def document(self) -> Document:
        return {"context": self.query, "choices": self.choices, "gold": self.gold}


class WinograndeItem(Item):
    """A sentence with a blank `_`, two words for it, and which of them fits: \"1\" or \"2\"."""

    sentence: str = Field(pattern="_")
    option1: str
    option2: str
    answer: Literal["1", "2"]

    def document(self) -> Document:
        before, _, after = self.sentence.partition("_")
        contexts = [before + option for option in (self.option1, self.option2)]
        return {"contexts": contexts, "continuation": after.strip(), "gold": int(self.answer) - 1}


def _question(question: str, choices: list[str], gold: int) -> Document:
    return {"context": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}


@dataclass(frozen=True)
class Definition:
    """How a task's items are read and scored.

    Attributes:
        item: checks a line and makes lm-eval's document of it.
        config: lm-eval's output type, and which column is the text, the target and the choices.
        metrics: names, in lm-eval's own registry.
    """

    item: type[Item]
    config: Mapping[str, str]
    metrics: tuple[str, ...]


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

DEFINITIONS = {
    "lambada_openai": Definition(LambadaItem, _CLOZE, ("perplexity", "acc")),
    "piqa": Definition(PiqaItem, _CHOICE, ("acc", "acc_norm")),
    "arc_easy": Definition(ArcItem, _CHOICE, ("acc", "acc_norm")),
    "hellaswag": Definition(HellaswagItem, _CHOICE, ("acc", "acc_norm")),
    "winogrande": Definition(WinograndeItem, _CONTEXTS, ("acc",)),
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
        return DEFINITIONS[task].item.model_validate(row).document()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"Line {number} of '{path}' is not an item of {task} ({reason}).") from None
