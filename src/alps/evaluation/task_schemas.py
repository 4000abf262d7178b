"""Schemas of the items of zero-shot tasks, in every form in which they are published, and their documents for lm-eval.

A schema has the fields of the data set that lm-eval takes from the hub. The forms of the authors' own files are
converted to it before they are checked. Every class follows the task of the same name in EleutherAI's
lm-evaluation-harness: same context, continuations and correct answer. `tests/evaluation/test_tasks.py` compares them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Document = dict[str, Any]


class Item(BaseModel):
    """Line of a task's file; fields that no prompt needs are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _from_published(cls, row: Any) -> Any:
        return cls.convert(dict(row)) if isinstance(row, dict) else row

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        """Convert the other published forms of an item to this one."""
        return row

    def document(self) -> Document:
        """Convert to a document of lm-eval, with the columns that the task's configuration names."""
        raise NotImplementedError


class LambadaItem(Item):
    """Passage whose last word is to be predicted."""

    text: str = Field(pattern=r"(?s)^.+ [^ ]+$")

    def document(self) -> Document:
        context, _, word = self.text.rpartition(" ")
        return {"context": context, "continuation": f" {word}"}


class PiqaItem(Item):
    """Goal and two ways to reach it; `label` is the index of the correct one."""

    goal: str
    sol1: str
    sol2: str
    label: int = Field(ge=0, le=1)

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # The authors' labels are lines of a file of their own, hence strings.
        return _with_number(row, "label")

    def document(self) -> Document:
        return _choice(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class Choices(BaseModel):
    """Answers and their labels, in the same order."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    text: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    label: list[str]


class LabelledItem(Item):
    """Answers with labels, and the label of the correct one."""

    choices: Choices
    answerKey: str  # noqa: N815 (the name in the data)

    @model_validator(mode="after")
    def _key_is_a_label(self) -> LabelledItem:
        if len(self.choices.text) != len(self.choices.label) or self.choices.label.count(self.answerKey) != 1:
            raise ValueError("answerKey is not exactly one of the labels, or there are not as many labels as texts")
        return self

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # The authors nest the choices, as objects of text and label, in the question.
        question = row.get("question")
        if not isinstance(question, dict):
            return row
        choices = question.get("choices")
        if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
            row["choices"] = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
        row["question"] = row["question_stem"] = question.get("stem")
        return row

    def answers(self, context: str) -> Document:
        """Convert to a document with the choice of an answer after `context`."""
        return _choice(context, self.choices.text, self.choices.label.index(self.answerKey))


class ArcItem(LabelledItem):
    """Question of ARC, easy or challenge."""

    question: str

    def document(self) -> Document:
        return self.answers(f"Question: {self.question}\nAnswer:")


class OpenbookqaItem(LabelledItem):
    """Beginning of a sentence, or a question, and its endings; blanks before the key are ignored."""

    question_stem: str

    @field_validator("answerKey")
    @classmethod
    def _without_blanks(cls, key: str) -> str:
        return key.lstrip()

    def document(self) -> Document:
        return self.answers(self.question_stem)


class HellaswagItem(Item):
    """Item of HellaSwag as lm-eval preprocesses it: a beginning, its endings, the index of the correct one."""

    query: str
    choices: list[str] = Field(min_length=2)
    gold: int = Field(ge=0)

    @model_validator(mode="after")
    def _gold_is_a_choice(self) -> HellaswagItem:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold {self.gold} is not the index of one of {len(self.choices)} choices")
        return self

    def document(self) -> Document:
        return _choice(self.query, self.choices, self.gold)


class RawHellaswagItem(Item):
    """Item of HellaSwag as published; `label` is the index of the correct ending, in digits on the hub."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str] = Field(min_length=4, max_length=4)
    label: Literal["0", "1", "2", "3"]

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # The authors' labels are numbers.
        return _with_digits(row, "label")

    def document(self) -> Document:
        query = _plain(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")
        return _choice(query, [_plain(ending) for ending in self.endings], int(self.label))


def _plain(text: str) -> str:
    """Remove the marks of WikiHow's pages from a text of HellaSwag, in lm-eval's order of steps."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class WinograndeItem(Item):
    """Sentence with a blank `_`, two words for it, and the number of the one that fits, `1` or `2`."""

    sentence: str = Field(pattern="_")
    option1: str
    option2: str
    answer: Literal["1", "2"]

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # Answers may be numbers, or lines of a file of labels.
        if "answer" not in row and "label" in row:
            row["answer"] = row["label"]
        return _with_digits(row, "answer")

    def document(self) -> Document:
        before, _, after = self.sentence.partition("_")
        contexts = [before + option for option in (self.option1, self.option2)]
        return {"contexts": contexts, "continuation": after.strip(), "gold": int(self.answer) - 1}


class BoolqItem(Item):
    """Question without its question mark, and a passage that answers it; `label` is 0 for no, 1 for yes."""

    passage: str
    question: str
    label: int = Field(ge=0, le=1)

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # BoolQ itself has a true or false `answer`, SuperGLUE's files a true or false `label`.
        name = "label" if "label" in row else "answer"
        if isinstance(row.get(name), bool):
            row["label"] = int(row[name])
        return _with_number(row, "label")

    def document(self) -> Document:
        return _choice(f"{self.passage}\nQuestion: {self.question}?\nAnswer:", ["no", "yes"], self.label)


class RteItem(Item):
    """Two texts; `label` is 0 if the first entails the second, else 1."""

    sentence1: str
    sentence2: str
    label: int = Field(ge=0, le=1)

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # SuperGLUE has other names for the texts, and both have files with labels in words.
        for name, other in (("sentence1", "premise"), ("sentence2", "hypothesis")):
            if name not in row and other in row:
                row[name] = row[other]
        if row.get("label") in ("entailment", "not_entailment"):
            row["label"] = int(row["label"] == "not_entailment")
        return _with_number(row, "label")

    def document(self) -> Document:
        context = f"{self.sentence1}\nQuestion: {self.sentence2} True or False?\nAnswer:"
        return _choice(context, ["True", "False"], self.label)


class MmluItem(Item):
    """Question on a subject, such as `high_school_physics`, with four answers; `answer` is the correct one's index."""

    subject: str = Field(min_length=1)
    question: str
    choices: list[str] = Field(min_length=4, max_length=4)
    answer: int = Field(ge=0, le=3)

    @classmethod
    def convert(cls, row: dict[str, Any]) -> dict[str, Any]:
        # The authors' files have a column for each choice, and the answer as a letter.
        for name, other in (("question", "input"), ("answer", "target")):
            if name not in row and other in row:
                row[name] = row[other]
        if "choices" not in row and all(letter in row for letter in "ABCD"):
            row["choices"] = [row[letter] for letter in "ABCD"]
        if isinstance(row.get("answer"), str) and row["answer"] in ("A", "B", "C", "D"):
            row["answer"] = "ABCD".index(row["answer"])
        return _with_number(row, "answer")

    def document(self) -> Document:
        subject = self.subject.replace("_", " ")
        lines = [
            f"The following are multiple choice questions (with answers) about {subject}.",
            "",
            self.question.strip(),
            *(f"{letter}. {choice}" for letter, choice in zip("ABCD", self.choices, strict=True)),
            "Answer:",
        ]
        return _choice("\n".join(lines), list("ABCD"), self.answer)


def _with_number(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Convert a field of digits to a number."""
    value = row.get(name)
    return row | {name: int(value)} if isinstance(value, str) and re.fullmatch("[0-9]", value) else row


def _with_digits(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Convert a number to digits."""
    value = row.get(name)
    return row | {name: str(value)} if isinstance(value, int) and not isinstance(value, bool) else row


def _choice(context: str, choices: list[str], gold: int) -> Document:
    return {"context": context, "choices": choices, "gold": gold}
