"""Synthetic items of zero-shot tasks in their published format, with quotes, brackets, blanks and line breaks."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]

_TEXT = (
    "the cat sat on a mat and Lily's dog 'ran' to \"the\" big red house; it was 42 or 3.5 {{x}} {% y %} [z] [] \\n "
    "naïve Once upon time they play happy sun tree ball said mom"
)


def make_items(task: str, count: int) -> list[Row]:
    """Return items of a task, equal at every call; those of MMLU are all of one subject."""
    draw = random.Random(task)
    return [_MAKERS[task](draw, number) for number in range(count)]


def _text(draw: random.Random, longest: int = 12) -> str:
    words = " ".join(draw.choices(_TEXT.split(), k=draw.randint(1, longest)))
    return draw.choice(["{}", "{}", "{}", " {}", "{} ", "{}\n", "{}\n\n{}", "{}  {}"]).format(words, words)


def _labelled(draw: random.Random, number: int) -> Row:
    labels = ["ABCD", "1234", "ABC", "12345"][number % 4]
    texts = [_text(draw, 5) for _ in labels]
    texts[0] = draw.choice([texts[0], "42", "['a', 'b']"])
    return {"choices": {"text": texts, "label": list(labels)}, "answerKey": draw.choice(labels)}


def _arc(draw: random.Random, number: int) -> Row:
    return {"id": f"q{number}", "question": _text(draw), **_labelled(draw, number)}


def _openbookqa(draw: random.Random, number: int) -> Row:
    row = {"id": str(number), "question_stem": _text(draw), **_labelled(draw, number)}
    return row | {"answerKey": " " * (number % 2) + row["answerKey"]} | ({"question_stem": "7"} if number == 3 else {})


def _boolq(draw: random.Random, number: int) -> Row:
    return {"idx": number, "question": _text(draw), "passage": _text(draw, 30), "label": draw.randint(0, 1)}


def _rte(draw: random.Random, number: int) -> Row:
    return {"idx": number, "sentence1": _text(draw, 30), "sentence2": _text(draw), "label": draw.randint(0, 1)}


def _mmlu(draw: random.Random, number: int) -> Row:
    choices = [_text(draw, 3) for _ in range(4)]
    subject = "high_school_us_history"
    return {"question": f"{number}: {_text(draw, 6)}", "subject": subject, "choices": choices, "answer": number % 4}


def _hellaswag(draw: random.Random, number: int) -> Row:
    marks = ["[header] How to {} [title] {}", "{} [substeps] {}", "{}  [step] {}", "{}   {}"]
    endings = [draw.choice(marks).format(_text(draw, 4), _text(draw, 4)) for _ in range(4)]
    return {
        "ind": number,
        "activity_label": _text(draw, 3),
        "ctx_a": draw.choice(marks).format(_text(draw), _text(draw)),
        "ctx_b": draw.choice(["", "a man in the USA", "Then [title] he"]),
        "endings": endings,
        "label": str(draw.randint(0, 3)),
    }


_MAKERS = {
    "arc_challenge": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "openbookqa": _openbookqa,
    "rte": _rte,
}
