"""Items of the zero-shot tasks as documents: the prompts made of them, and what is wrong with a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alps.core.errors import ConfigError
from alps.evaluation.local_tasks import DEFINITIONS, read_documents
from alps.evaluation.task_schemas import BoolqItem, RteItem

ITEMS: dict[str, dict[str, Any]] = {
    "lambada_openai": {"text": "a b\n\nc  d, e don't"},
    "piqa": {"goal": "Boil an egg.", "sol1": "in water", "sol2": "in sand", "label": 1},
    "arc_easy": {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    "arc_challenge": {"question": "So?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
    "hellaswag": {"query": "A man", "choices": ["sits.", "runs.", "eats."], "gold": 2, "query_as_stored": "a man"},
    "winogrande": {"sentence": "The _ is big, a_b .", "option1": "cat", "option2": "dog", "answer": "2"},
    "boolq": {"question": "is it so", "passage": "It is.", "label": 1, "idx": 3},
    "rte": {"sentence1": "A man sits.", "sentence2": "He sits.", "label": 0},
    "openbookqa": {"question_stem": "Ice is", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": " B"},
    "mmlu": {"question": " Why?\n", "subject": "us_law", "choices": ["a", " b", "", "d"], "answer": 3},
}


DOCUMENTS: dict[str, dict[str, Any]] = {
    "lambada_openai": {"context": "a b\n\nc  d, e", "continuation": " don't"},
    "piqa": {"context": "Question: Boil an egg.\nAnswer:", "choices": ["in water", "in sand"], "gold": 1},
    "arc_easy": {"context": "Question: Why?\nAnswer:", "choices": ["x", "y", "z"], "gold": 2},
    "arc_challenge": {"context": "Question: So?\nAnswer:", "choices": ["x", "y"], "gold": 0},
    "hellaswag": {"context": "A man", "choices": ["sits.", "runs.", "eats."], "gold": 2},
    "winogrande": {"contexts": ["The cat", "The dog"], "continuation": "is big, a_b .", "gold": 1},
    "boolq": {"context": "It is.\nQuestion: is it so?\nAnswer:", "choices": ["no", "yes"], "gold": 1},
    "rte": {
        "context": "A man sits.\nQuestion: He sits. True or False?\nAnswer:",
        "choices": ["True", "False"],
        "gold": 0,
    },
    "openbookqa": {"context": "Ice is", "choices": ["x", "y"], "gold": 1},
    "mmlu": {
        "context": "The following are multiple choice questions (with answers) about us law.\n\n"
        "Why?\nA. a\nB.  b\nC. \nD. d\nAnswer:",
        "choices": ["A", "B", "C", "D"],
        "gold": 3,
    },
}


RAW_HELLASWAG: dict[str, Any] = {
    "activity_label": "Cooking",
    "ctx_a": "How to boil [title] An egg [substeps] .  Water",
    "ctx_b": "the Man",
    "endings": [" sits. ", "is  [the step] told [title] to go.", "runs.", "eats [x] [y]."],
    "label": "1",
}


def _write(folder: Path, task: str, *lines: object) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("task", DEFINITIONS)
def test_documents_of_items(task: str, tmp_path: Path) -> None:
    _write(tmp_path, task, ITEMS[task], "", ITEMS[task], ITEMS[task])
    assert read_documents(task, tmp_path) == [DOCUMENTS[task]] * 3
    assert read_documents(task, tmp_path, 2) == [DOCUMENTS[task]] * 2


def test_hellaswag_as_published(tmp_path: Path) -> None:
    """Marks in brackets go, titles end a sentence, two blanks become one, once."""
    _write(tmp_path, "hellaswag", RAW_HELLASWAG, ITEMS["hellaswag"], {**ITEMS["hellaswag"], "ctx_a": "x"})
    raw = {
        "context": "Cooking: How to boil. An egg . Water The man",
        "choices": ["sits.", "is  told. to go.", "runs.", "eats ."],
        "gold": 1,
    }
    assert read_documents("hellaswag", tmp_path) == [raw, *[DOCUMENTS["hellaswag"]] * 2]


WRONG: dict[str, tuple[str, object, str]] = {
    "one word": ("lambada_openai", {"text": "alone"}, "text: String should match"),
    "no last word": ("lambada_openai", {"text": "a b "}, "text: String should match"),
    "half a surrogate pair": ("lambada_openai", '{"text": "a \\ud800"}', "text: "),
    "no such solution": ("piqa", ITEMS["piqa"] | {"label": 2}, "label: Input should be less than or equal to 1"),
    "a label that is true": ("piqa", ITEMS["piqa"] | {"label": True}, "label: Input should be a valid integer"),
    "a missing field": ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "sol2: Field required"),
    "a list": ("piqa", "[1]", "Input should be a valid dictionary"),
    "no such key": ("arc_easy", ITEMS["arc_easy"] | {"answerKey": "4"}, "answerKey is not exactly one"),
    "two such keys": (
        "arc_easy",
        ITEMS["arc_easy"] | {"choices": {"text": ["x", "y"], "label": ["3", "3"]}},
        "answerKey is not exactly one",
    ),
    "labels to spare": (
        "arc_easy",
        ITEMS["arc_easy"] | {"choices": {"text": ["x", "y"], "label": ["1", "2", "3"]}},
        "not as many labels as texts",
    ),
    "one choice": ("hellaswag", ITEMS["hellaswag"] | {"choices": ["a"], "gold": 0}, "choices: List should have"),
    "gold too far": ("hellaswag", ITEMS["hellaswag"] | {"gold": 3}, "gold 3 is not the index of one of 3 choices"),
    "gold below": ("hellaswag", ITEMS["hellaswag"] | {"gold": -1}, "gold: "),
    "published, unlabelled": (
        "hellaswag",
        RAW_HELLASWAG | {"label": ""},
        "label: Input should be '0', '1', '2' or '3'",
    ),
    "published, a part missing": (
        "hellaswag",
        {**RAW_HELLASWAG, "ctx_b": None},
        "ctx_b: Input should be a valid string",
    ),
    "neither form": ("hellaswag", {"ctx_a": "a", "endings": []}, "activity_label: Field required"),
    "an empty answer": (
        "arc_challenge",
        ITEMS["arc_challenge"] | {"choices": {"text": ["x", ""], "label": ["A", "B"]}},
        "choices.text.1: String should have at least 1 character",
    ),
    "unlabelled": ("boolq", ITEMS["boolq"] | {"label": -1}, "label: Input should be greater than or equal to 0"),
    "in other words": ("rte", ITEMS["rte"] | {"label": "entails"}, "label: Input should be a valid integer"),
    "three answers": ("mmlu", ITEMS["mmlu"] | {"choices": ["a", "b", "c"]}, "choices: List should have at least 4"),
    "no such letter": ("mmlu", ITEMS["mmlu"] | {"answer": "E"}, "answer: Input should be a valid integer"),
    "fields of another task": (
        "boolq",
        {"premise": "a", "hypothesis": "b", "label": 1},
        "(passage: Field required): it has the fields premise, hypothesis, label, and passage, question, label are",
    ),
    "an answer in words": ("boolq", {"question": "q", "passage": "p", "answer": "yes"}, "label: Field required"),
    "no blank": ("winogrande", ITEMS["winogrande"] | {"sentence": "none"}, "sentence: String should match"),
    "answer unknown": ("winogrande", ITEMS["winogrande"] | {"answer": ""}, "answer: Input should be '1' or '2'"),
}


@pytest.mark.parametrize(("task", "line", "reason"), WRONG.values(), ids=WRONG)
def test_bad_lines_are_named(task: str, line: object, reason: str, tmp_path: Path) -> None:
    path = _write(tmp_path, task, ITEMS[task], line)
    with pytest.raises(ConfigError) as found:
        read_documents(task, tmp_path, 1)
    sentence = str(found.value)
    assert sentence.startswith(f"Line 2 of '{path}' is not an item of {task} (") and reason in sentence
    assert "\n" not in sentence and "pydantic" not in sentence


def _nested(row: dict[str, Any], stem: str) -> dict[str, Any]:
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    choices = [{"text": text, "label": label} for text, label in pairs]
    return {"id": "1", "question": {"stem": row[stem], "choices": choices}, "answerKey": row["answerKey"]}


def _without(row: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names} | more


_BOOLQ, _RTE, _MMLU = ITEMS["boolq"], ITEMS["rte"], ITEMS["mmlu"]
_SUPER_RTE = {"premise": _RTE["sentence1"], "hypothesis": _RTE["sentence2"], "idx": 3}
_LETTERS = dict(zip("ABCD", _MMLU["choices"], strict=True))
# Other forms in which the same items are published.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "lambada, with its domain": ("lambada_openai", {**ITEMS["lambada_openai"], "domain": None}),
    "ARC's own files": ("arc_easy", _nested(ITEMS["arc_easy"], "question")),
    "ARC's own files, challenge": ("arc_challenge", _nested(ITEMS["arc_challenge"], "question")),
    "OpenBookQA's own files": ("openbookqa", _nested(ITEMS["openbookqa"], "question_stem")),
    "WinoGrande, answers as numbers": ("winogrande", {**ITEMS["winogrande"], "answer": 2, "qID": "x-2"}),
    "BoolQ itself": ("boolq", _without(_BOOLQ, "label", answer=True, title="It")),
    "BoolQ in SuperGLUE's files": ("boolq", {**_BOOLQ, "label": True}),
    "RTE in SuperGLUE": ("rte", {**_SUPER_RTE, "label": 0}),
    "RTE in SuperGLUE's files": ("rte", {**_SUPER_RTE, "label": "entailment"}),
    "RTE in GLUE's files": ("rte", {**_RTE, "index": "4", "label": "entailment"}),
    "MMLU, answers as letters": ("mmlu", {**_MMLU, "answer": "D"}),
    "MMLU, a column for each choice": ("mmlu", _without(_MMLU, "choices", **_LETTERS, answer="D")),
    "MMLU, other names": (
        "mmlu",
        {"subject": _MMLU["subject"], "input": _MMLU["question"], **_LETTERS, "target": "D"},
    ),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_published_forms_give_the_same_document(form: str, tmp_path: Path) -> None:
    task, row = PUBLISHED[form]
    _write(tmp_path, task, row)
    assert read_documents(task, tmp_path) == [DOCUMENTS[task]]


def test_false_is_no() -> None:
    rows = [_without(_BOOLQ, "label", answer=False), {**_BOOLQ, "label": False}, {**_BOOLQ, "label": 0}]
    assert [BoolqItem.model_validate(row).document()["gold"] for row in rows] == [0, 0, 0]
    words = {**_SUPER_RTE, "label": "not_entailment"}
    assert RteItem.model_validate(words).document()["gold"] == 1


def test_hellaswag_of_its_authors_has_numbers(tmp_path: Path) -> None:
    _write(tmp_path, "hellaswag", RAW_HELLASWAG, RAW_HELLASWAG | {"label": 1, "ctx": "x", "split_type": "zeroshot"})
    first, second = read_documents("hellaswag", tmp_path)
    assert first == second
