"""The items of zero-shot tasks, with the fields of the original data sets, and what lm-eval makes of each.

Every class follows the task of the same name in EleutherAI's lm-evaluation-harness: the same context, continuations
and right answer. `tests/evaluation/test_tasks.py` holds them to it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
        return _choice(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class Choices(BaseModel):
    """Answers and their labels, in the same order."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    text: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    label: list[str]


class LabelledItem(Item):
    """Answers with labels, and the label of the right one."""

    choices: Choices
    answerKey: str  # noqa: N815 (the name in the data)

    @model_validator(mode="after")
    def _key_is_a_label(self) -> LabelledItem:
        if len(self.choices.text) != len(self.choices.label) or self.choices.label.count(self.answerKey) != 1:
            raise ValueError("answerKey is not exactly one of the labels, or there are not as many labels as texts")
        return self

    def answers(self, context: str) -> Document:
        """The document that asks for one of the answers after `context`."""
        return _choice(context, self.choices.text, self.choices.label.index(self.answerKey))


class ArcItem(LabelledItem):
    """A question of ARC, easy or challenge."""

    question: str

    def document(self) -> Document:
        return self.answers(f"Question: {self.question}\nAnswer:")


class OpenbookqaItem(LabelledItem):
    """The beginning of a sentence, or a question, and its endings; blanks before the key do not count."""

    question_stem: str

    @field_validator("answerKey")
    @classmethod
    def _without_blanks(cls, key: str) -> str:
        return key.lstrip()

    def document(self) -> Document:
        return self.answers(self.question_stem)


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
        return _choice(self.query, self.choices, self.gold)


class RawHellaswagItem(Item):
    """An item of HellaSwag as published: `label` is the index of the right ending, in digits."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str] = Field(min_length=4, max_length=4)
    label: Literal["0", "1", "2", "3"]

    def document(self) -> Document:
        query = _plain(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")
        return _choice(query, [_plain(ending) for ending in self.endings], int(self.label))


def _plain(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag, in lm-eval's order of steps."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


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


class BoolqItem(Item):
    """A question without its question mark, and a passage that answers it; `label` is 0 for no, 1 for yes."""

    passage: str
    question: str
    label: int = Field(ge=0, le=1)

    def document(self) -> Document:
        return _choice(f"{self.passage}\nQuestion: {self.question}?\nAnswer:", ["no", "yes"], self.label)


class RteItem(Item):
    """Two texts; `label` is 0 where the first entails the second, else 1."""

    sentence1: str
    sentence2: str
    label: int = Field(ge=0, le=1)

    def document(self) -> Document:
        context = f"{self.sentence1}\nQuestion: {self.sentence2} True or False?\nAnswer:"
        return _choice(context, ["True", "False"], self.label)


class MmluItem(Item):
    """A question on a subject, such as `high_school_physics`, and four answers; `answer` is the right one's index."""

    subject: str = Field(min_length=1)
    question: str
    choices: list[str] = Field(min_length=4, max_length=4)
    answer: int = Field(ge=0, le=3)

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


def _choice(context: str, choices: list[str], gold: int) -> Document:
    return {"context": context, "choices": choices, "gold": gold}
