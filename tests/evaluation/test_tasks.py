"""Local tasks against lm-eval's own configurations of them, on the same items. Skipped where lm-eval is missing."""

from __future__ import annotations

import functools
import importlib.util
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
from alps import cli
from alps.errors import ConfigError
from alps.evaluation.definitions import DEFINITIONS, read_documents
from alps.evaluation.records import TaskRecord
from alps.evaluation.tasks import find_tasks, local_task

pytestmark = pytest.mark.filterwarnings("ignore")  # those of lm-eval and its dependencies

TASKS = list(DEFINITIONS)
ITEMS = 40


class _Loader(yaml.SafeLoader):
    """lm-eval's YAML: `!function file.name` is a function of a file beside it."""

    folder = Path()


def _function(loader: Any, node: Any) -> Any:
    file, _, name = loader.construct_scalar(node).partition(".")
    spec = importlib.util.spec_from_file_location(file, loader.folder / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


_Loader.add_constructor("!function", _function)


def _own_config(task: str, data: Path, cache: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task as installed, with only its data replaced."""
    import lm_eval.tasks

    files = {"lambada_openai": "lambada", "arc_easy": "arc", "winogrande": "winogrande"}
    name = "default" if task == "winogrande" else task
    path = Path(lm_eval.tasks.__file__).parent / files.get(task, task) / f"{name}.yaml"
    loader = type("_Here", (_Loader,), {"folder": path.parent})
    config: dict[str, Any] = yaml.load(path.read_text(), Loader=loader)
    split = config.get("test_split") or config["validation_split"]
    for key in ("training_split", "validation_split", "test_split", "dataset_name", "tag"):
        config.pop(key, None)
    if task == "hellaswag":  # its items are already what process_docs makes of them
        config.pop("process_docs")
    files_of = {"data_files": {split: str(data)}, "cache_dir": str(cache)}
    return config | {"dataset_path": "json", "dataset_kwargs": files_of, "test_split": split}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first items of every task, HellaSwag's with the field that lm-eval's configuration names."""
    source = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "zeroshot"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/zeroshot")
    folder = tmp_path_factory.mktemp("zeroshot")
    for task in TASKS:
        rows = [json.loads(line) for line in (source / f"{task}.jsonl").read_text().split("\n")[:ITEMS]]
        lines = [json.dumps(row | ({"label": str(row["gold"])} if task == "hellaswag" else {})) for row in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def records(data: Path, stories: Path) -> dict[str, TaskRecord]:
    found = alps.evaluate_tasks(alps.load(str(stories)), TASKS, data, ITEMS, batch_size=16)
    return {record.task: record for record in found}


@pytest.fixture(scope="module")
def own(data: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """lm-eval's task objects on these items, and what lm-eval finds with them, every item kept."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    cache = tmp_path_factory.mktemp("cache")
    tasks = {task: ConfigurableTask(config=_own_config(task, data / f"{task}.jsonl", cache)) for task in TASKS}
    loaded = alps.load(str(stories))
    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=16)
    return tasks, evaluate(model, tasks, bootstrap_iters=1000)


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_and_continuation_is_lm_evals(task: str, data: Path, own: tuple[dict[str, Any], Any]) -> None:
    ours = local_task(task, read_documents(task, data))
    ours.build_all_requests()
    theirs = own[0][task]
    assert len(theirs.eval_docs) == ITEMS and len(theirs.instances) >= ITEMS
    assert [one.args for one in ours.instances] == [one.args for one in theirs.instances]


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_lm_evals_to_the_last_item(
    task: str, records: dict[str, TaskRecord], own: tuple[dict[str, Any], Any]
) -> None:
    theirs, samples = own[1]["results"][task], own[1]["samples"][task]
    record = records[task]
    assert set(record.metrics) == {metric["metric"] for metric in own[0][task].config.metric_list}
    for metric, found in record.metrics.items():
        assert found.value == theirs[f"{metric},none"]
        assert found.stderr == theirs[f"{metric}_stderr,none"] > 0
    right = sum(sample["acc"] for sample in samples)
    assert len(samples) == record.items == ITEMS and record.metrics["acc"].value == right / ITEMS
    assert 0 < right < ITEMS and record.num_fewshot == 0


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "hellaswag", "winogrande"])
def test_accuracies_are_those_of_a_plain_loop(
    task: str, data: Path, stories: Path, records: dict[str, TaskRecord]
) -> None:
    """Sum of log-probabilities of every choice, one forward each, without lm-eval."""
    loaded = alps.load(str(stories))
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
    assert metrics["acc"].value == right / ITEMS
    assert "acc_norm" not in metrics or metrics["acc_norm"].value == right_by_length / ITEMS


def _log_probability(loaded: Any, context: str, ending: str) -> float:
    whole, start = loaded.tokenizer(context + ending).input_ids, len(loaded.tokenizer(context).input_ids)
    with torch.no_grad():
        scores = loaded.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(scores[i - 1, whole[i]] for i in range(start, len(whole))))


def _numpy_state() -> str:
    return str(np.random.get_state(legacy=True))


def test_nothing_of_the_caller_is_changed(data: Path, stories: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = alps.load(str(stories))
    loaded.model.train()
    state = torch.get_rng_state(), random.getstate(), _numpy_state()
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    padding, environment = loaded.tokenizer.pad_token_id, dict(os.environ)
    (record,) = alps.evaluate_tasks(loaded, ["lambada_openai"], data, 1)
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
    loaded = alps.load(str(stories))
    (record,) = alps.evaluate_tasks(loaded, ["mine"], limit=5)
    assert (record.task, record.items, record.num_fewshot) == ("mine", 5, 2)
    assert set(record.metrics) == {"acc", "acc_norm"}
    with pytest.raises(ConfigError, match=r"Task 'mien' is not one of lm-eval's 2\. Did you mean 'mine'\?"):
        find_tasks(["mien"])
    with pytest.raises(ConfigError, match=r"Tasks absent cannot be taken from the hub .*--task-data"):
        alps.evaluate_tasks(loaded, ["absent"])


def test_what_cannot_be_scored(data: Path, stories: Path) -> None:
    loaded = alps.load(str(stories))
    with pytest.raises(ConfigError, match="Batches of 0"):
        alps.evaluate_tasks(loaded, ["piqa"], data, batch_size=0)
    loaded.tokenizer = None
    with pytest.raises(ConfigError, match="need the model's tokenizer"):
        alps.evaluate_tasks(loaded, ["piqa"], data)
