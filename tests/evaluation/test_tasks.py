"""Local tasks against lm-eval's own configurations of them, on the same items. Skipped where lm-eval is missing."""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import alps
from alps.cli import main as cli
from alps.core.errors import ConfigError
from alps.data.loaded_model import load
from alps.evaluation.local_tasks import DEFINITIONS, read_documents
from alps.evaluation.tasks import _record, find_tasks, local_task
from alps.reporting.records import TaskRecord
from helpers.cli_process import run_group
from helpers.fake_task_items import Row, make_items

# Warnings of lm-eval and its dependencies.
pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore")]

TASKS = list(DEFINITIONS)
ITEMS = 40
MMLU_ITEMS = 80  # more than subjects

# Where lm-eval's own configurations take their items from.
HUB = {
    ("EleutherAI/lambada_openai", "default"): "lambada_openai",
    ("baber/piqa", None): "piqa",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("Rowan/hellaswag", None): "hellaswag",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("aps/super_glue", "boolq"): "boolq",
    ("nyu-mll/glue", "rte"): "rte",
    ("allenai/openbookqa", "main"): "openbookqa",
}


def _raw_hellaswag(row: Row) -> Row:
    """An item as published, from one that is preprocessed and remembers how its second part began."""
    query, stored = row["query"], row["query_as_stored"]
    start = next((i for i, (a, b) in enumerate(zip(query, stored, strict=True)) if a != b), len(stored))
    label = stored.partition(": ")[0]
    first, second = stored[len(label) + 2 : start].removesuffix(" "), stored[start:]
    return {
        "activity_label": label,
        "ctx_a": first,
        "ctx_b": second,
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real items of five tasks, HellaSwag's half made up; those of the others made up, MMLU's of all its subjects."""
    import lm_eval.tasks

    source = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "zeroshot"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/zeroshot")
    folder = tmp_path_factory.mktemp("zeroshot")
    for task in TASKS:
        if (source / f"{task}.jsonl").exists():
            rows = [json.loads(line) for line in (source / f"{task}.jsonl").read_text().split("\n")[:ITEMS]]
        else:
            rows = make_items(task, MMLU_ITEMS if task == "mmlu" else ITEMS)
        if task == "hellaswag":
            rows = [*map(_raw_hellaswag, rows[: ITEMS // 2]), *make_items(task, ITEMS // 2)]
            rows = [{"ind": None, **row} for row in rows]
        if task == "mmlu":
            own = (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml")
            subjects = sorted(path.stem.removeprefix("mmlu_") for path in own)
            assert len(subjects) == 57
            rows = [row | {"subject": subjects[i % len(subjects)]} for i, row in enumerate(rows)]
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def _rows(data: Path, task: str) -> list[Row]:
    return [json.loads(line) for line in (data / f"{task}.jsonl").read_text().split("\n")]


@pytest.fixture(scope="module")
def records(data: Path, stories: Path) -> dict[str, TaskRecord]:
    found = alps.evaluate_tasks(load(str(stories)), TASKS, task_data=data, batch_size=16)
    return {record.task: record for record in found}


@pytest.fixture(scope="module")
def own(data: Path, stories: Path) -> Any:
    """Scores of lm-eval by its own configurations; only the hub's answers are replaced by these items."""
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    def answer(path: str, name: str | None = None, **_: Any) -> Any:
        if path == "cais/mmlu":
            rows = [row for row in _rows(data, "mmlu") if row["subject"] == name]
        else:
            rows = _rows(data, HUB[path, name])
        items = datasets.Dataset.from_list(rows)
        return dict.fromkeys(("train", "validation", "test", "dev"), items)

    loaded = load(str(stories))
    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", answer)
        # lm-eval resamples in forked processes otherwise, and a fork of a process with torch's threads can hang.
        patch.setenv("DISABLE_MULTIPROC", "1")
        index = find_tasks(TASKS).index
        return simple_evaluate(model, tasks=TASKS, task_manager=index, log_samples=True, bootstrap_iters=1000)


def _own_samples(own: Any, task: str, data: Path) -> list[Any]:
    """lm-eval's account of every item, in the order of the file; it keeps MMLU's by subject."""
    if task != "mmlu":
        return sorted(own["samples"][task], key=lambda sample: sample["doc_id"])
    of = {name: iter(sorted(found, key=lambda s: s["doc_id"])) for name, found in own["samples"].items()}
    return [next(of[f"mmlu_{row['subject']}"]) for row in _rows(data, "mmlu")]


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_and_continuation_is_lm_evals(task: str, data: Path, own: Any) -> None:
    ours = local_task(task, read_documents(task, data))
    ours.build_all_requests()
    rows, samples = _rows(data, task), _own_samples(own, task, data)
    assert len(samples) == len(rows) == (MMLU_ITEMS if task == "mmlu" else ITEMS)
    assert all(row.items() <= sample["doc"].items() for row, sample in zip(rows, samples, strict=True))
    theirs = [tuple(pair) for sample in samples for pair in sample["arguments"]]
    assert [one.args for one in ours.instances] == theirs and len(theirs) >= ITEMS


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_lm_evals_to_the_last_item(task: str, records: dict[str, TaskRecord], own: Any, data: Path) -> None:
    theirs, samples = own["results"][task], _own_samples(own, task, data)
    record = records[task]
    kind = "mmlu_anatomy" if task == "mmlu" else task
    assert set(record.metrics) == {metric["metric"] for metric in own["configs"][kind]["metric_list"]}
    for metric, found in record.metrics.items():
        values = [sample[metric] for sample in samples]
        assert found.value == theirs[f"{metric},none"]
        if task == "mmlu":  # a group's error is pooled from its tasks, which a subject of one item has none of
            assert found.stderr == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)
        else:
            assert found.stderr == theirs[f"{metric}_stderr,none"] > 0
    right = sum(sample["acc"] for sample in samples)
    assert len(samples) == record.items and record.metrics["acc"].value == right / len(samples)
    assert 0 < right < len(samples) and record.num_fewshot == 0


def test_mmlu_by_name_has_a_row_for_every_subject_and_group(own: Any) -> None:
    """As the hub's tasks are recorded: a group has an average and no items of its own."""
    rows = {name: _record("m", name, own) for name in own["results"] if name.startswith("mmlu")}
    assert len(rows) == 57 + 4 + 1 and {"mmlu", "mmlu_stem", "mmlu_anatomy"} <= rows.keys()
    assert rows["mmlu"].items is None and rows["mmlu_anatomy"].items == 2
    subjects = [row for row in rows.values() if row.items is not None]
    right = sum(row.metrics["acc"].value * row.items for row in subjects if row.items)
    assert len(subjects) == 57 and rows["mmlu"].metrics["acc"].value == pytest.approx(right / MMLU_ITEMS)


def test_hellaswag_may_be_preprocessed(data: Path, tmp_path: Path) -> None:
    """lm-eval's own preprocessing, written to a file, gives the same documents as the published fields."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    lines = []
    for row in _rows(data, "hellaswag"):
        query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        done = {"query": query, "choices": [preprocess(one) for one in row["endings"]], "gold": int(row["label"])}
        lines += [json.dumps(done), json.dumps(row | done)]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines))
    expected = read_documents("hellaswag", data)
    assert read_documents("hellaswag", tmp_path) == [one for one in expected for _ in range(2)]
    assert any("[" in ending for row in _rows(data, "hellaswag") for ending in row["endings"])


@pytest.mark.parametrize("task", [task for task in TASKS if task != "lambada_openai"])
def test_accuracies_are_those_of_a_plain_loop(
    task: str, data: Path, stories: Path, records: dict[str, TaskRecord]
) -> None:
    """Sum of log-probabilities of every choice, one forward each, without lm-eval."""
    loaded = load(str(stories))
    documents = read_documents(task, data)
    right, right_by_length = 0, 0
    for document in documents:
        pairs = [(context, document["continuation"]) for context in document.get("contexts", [])]
        pairs = pairs or [(document["context"], choice) for choice in document["choices"]]
        scores = np.array([_log_probability(loaded, context, f" {ending}") for context, ending in pairs])
        lengths = np.array([len(choice) for choice in document.get("choices", pairs)])
        right += int(scores.argmax() == document["gold"])
        right_by_length += int((scores / lengths).argmax() == document["gold"])
    metrics = records[task].metrics
    assert metrics["acc"].value == right / len(documents)
    assert "acc_norm" not in metrics or metrics["acc_norm"].value == right_by_length / len(documents)


def _log_probability(loaded: Any, context: str, ending: str) -> float:
    whole, start = loaded.tokenizer(context + ending).input_ids, len(loaded.tokenizer(context).input_ids)
    with torch.no_grad():
        scores = loaded.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(scores[i - 1, whole[i]] for i in range(start, len(whole))))


def _numpy_state() -> str:
    return str(np.random.get_state(legacy=True))


def test_nothing_of_the_caller_is_changed(data: Path, stories: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(str(stories))
    loaded.model.train()
    state = torch.get_rng_state(), random.getstate(), _numpy_state()
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    padding, environment = loaded.tokenizer.pad_token_id, dict(os.environ)
    (record,) = alps.evaluate_tasks(loaded, ["lambada_openai"], task_data=data, limit=1)
    assert record.items == 1 and record.metrics["acc"].stderr is None
    assert loaded.model.training and loaded.tokenizer.pad_token_id == padding
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert _numpy_state() == state[2] and dict(os.environ) == environment
    assert capfd.readouterr().out == ""


def test_the_command_prints_tasks_beside_texts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], data: Path, stories: Path, english_file: Path
) -> None:
    options = f"--tasks winogrande,lambada_openai --task-data {data} --limit 6 --batch-size 3"
    texts = f"--text {english_file} --seqlen 32 --windows 2"
    monkeypatch.setattr(sys, "argv", ["alps", "eval", str(stories), *options.split(), *texts.split()])
    with pytest.raises(SystemExit) as left:
        cli.run()
    assert not left.value.code
    printed = capfd.readouterr()
    rows = json.loads(printed.out)
    assert [row.get("task") for row in rows] == [None, "winogrande", "lambada_openai"]
    assert rows[0]["windows"] == 2 and [row["items"] for row in rows[1:]] == [6, 6]
    assert set(rows[2]["metrics"]) == {"acc", "perplexity"} and rows[2]["metrics"]["acc"].keys() == {"value", "stderr"}
    accuracy = rows[1]["metrics"]["acc"]
    assert f"{100 * accuracy['value']:.1f} ± {100 * accuracy['stderr']:.1f}" in printed.err
    assert "`pretrained` model" not in printed.err


def test_two_processes_share_out_the_items(data: Path, stories: Path, english_file: Path) -> None:
    """Nine items of each, so that one process has an item more; what is resampled depends on the items' order."""
    options = ["--tasks", "piqa,lambada_openai,hellaswag", "--task-data", data, "--limit", 9, "--batch-size", 2]
    texts = ["--text", english_file, "--seqlen", 32, "--windows", 3]
    found = [run_group(count, "eval", stories, *options, *texts) for count in (1, 2)]
    assert all(done.returncode == 0 for group in found for done in group), found
    one, two = (json.loads("".join(done.stdout for done in group)) for group in found)
    assert [(row.get("task"), row.get("items")) for row in two[1:]] == [
        (name, 9) for name in ("piqa", "lambada_openai", "hellaswag")
    ]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-9)
    for mine, theirs in zip(one[1:], two[1:], strict=True):
        for name, estimate in mine["metrics"].items():
            assert theirs["metrics"][name]["value"] == pytest.approx(estimate["value"], rel=1e-5)
            if name.startswith("acc"):
                assert theirs["metrics"][name]["stderr"] == pytest.approx(estimate["stderr"], rel=1e-9)


def test_fewer_items_than_processes_are_refused(data: Path, stories: Path) -> None:
    for done in run_group(2, "eval", stories, "--tasks", "piqa", "--task-data", data, "--limit", 1):
        assert done.returncode == 2
        assert "Task piqa has 1 items for 2 processes: start fewer, or raise --limit." in done.stderr


def test_without_data_the_names_are_lm_evals(
    monkeypatch: pytest.MonkeyPatch, data: Path, stories: Path, tmp_path: Path
) -> None:
    """On a task of lm-eval's kind from a file, and one whose data cannot be fetched."""
    import lm_eval.tasks

    local: dict[str, Any] = {
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_target": "label",
    }
    local |= {"doc_to_text": "goal", "doc_to_choice": "{{[sol1, sol2]}}", "num_fewshot": 2, "fewshot_split": "test"}
    files = {"data_files": {"test": str(data / "piqa.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    absent = local | {"dataset_path": str(tmp_path / "nowhere")}
    for name, config in {"mine": local | {"dataset_kwargs": files}, "absent": absent}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))
    manager = functools.partial(lm_eval.tasks.TaskManager, include_path=str(tmp_path))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False))
    loaded = load(str(stories))
    (record,) = alps.evaluate_tasks(loaded, ["mine"], limit=5)
    assert (record.task, record.items, record.num_fewshot) == ("mine", 5, 2)
    assert set(record.metrics) == {"acc", "acc_norm"}
    with pytest.raises(ConfigError, match=r"Task 'mien' is not one of lm-eval's 2\. Did you mean 'mine'\?"):
        find_tasks(["mien"])
    with pytest.raises(ConfigError, match=r"Tasks absent cannot be taken from the hub .*--task-data"):
        alps.evaluate_tasks(loaded, ["absent"])


def test_what_cannot_be_scored(data: Path, stories: Path) -> None:
    loaded = load(str(stories))
    with pytest.raises(ConfigError, match="Batches of 0"):
        alps.evaluate_tasks(loaded, ["piqa"], task_data=data, batch_size=0)
    loaded.tokenizer = None
    with pytest.raises(ConfigError, match="need the model's tokenizer"):
        alps.evaluate_tasks(loaded, ["piqa"], task_data=data)
