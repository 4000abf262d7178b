"""Zero-shot tasks, scored by EleutherAI's lm-eval on a model in memory.

With a folder of local files (see `local_tasks`) nothing is fetched: this module reads and checks the items and passes
them to lm-eval in memory. Without one, the names are those of lm-eval's own tasks, whose data come from the hub.
lm-eval is an optional package, imported only by the functions that need it.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import ConfigError, did_you_mean
from alps.core.half_precision import half_matmul_in_float32
from alps.data.loaded_model import LoadedModel
from alps.evaluation.local_tasks import DEFINITIONS, read_documents
from alps.evaluation.task_schemas import Document
from alps.reporting.records import Estimate, TaskRecord

# Bootstrap samples for the standard error of perplexity. lm-eval's default, 100,000, takes minutes.
_RESAMPLES = 1000
# Earlier versions look up tasks in memory among their own.
_OLDEST = "0.4.12"
_INSTALL = f'pip install "lm-eval>={_OLDEST}" accelerate'


@dataclass(frozen=True)
class TaskSet:
    """Tasks that can be scored: names of lm-eval's own, or documents by name.

    Attributes:
        names: of the tasks, without duplicates.
        documents: of local tasks, by name; None for lm-eval's own tasks.
        limit: number of items of each of lm-eval's own tasks; documents are already cut to it.
        index: lm-eval's `TaskManager`.
    """

    names: tuple[str, ...]
    documents: Mapping[str, list[Document]] | None
    limit: int | None
    index: Any


def find_tasks(names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> TaskSet:
    """Check everything that can be checked before a model is loaded.

    Args:
        names: of tasks; with a `folder`, keys of `local_tasks.DEFINITIONS`.
        folder: contains NAME.jsonl for every task; None for lm-eval's own tasks, from the hub.
        limit: number of items of each task, the first ones; None for all.

    Raises:
        ConfigError: without a name, for an unknown one, for data that cannot be used, or without lm-eval.
    """
    unique_names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not unique_names:
        raise ConfigError(f"No task is named: give some, separated by commas, such as {','.join(DEFINITIONS)}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"A limit of {limit} items leaves nothing to score: give at least 1.")
    documents = None if folder is None else {name: read_documents(name, folder, limit) for name in unique_names}
    for package in ("lm_eval", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = package.replace("_", "-")
            raise ConfigError(f"Tasks need the package {name} ({error}): {_INSTALL}") from None
    if Version(version("lm-eval")) < Version(_OLDEST):
        raise ConfigError(f"Tasks need lm-eval {_OLDEST} or newer, and {version('lm-eval')} is installed: {_INSTALL}")
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=documents is None)
    for name in unique_names:
        if documents is None and name not in index.all_tasks:
            near = did_you_mean(name, index.all_tasks)
            raise ConfigError(f"Task '{name}' is not one of lm-eval's {len(index.all_tasks)}.{near}")
    return TaskSet(unique_names, documents, limit, index)


def score_tasks(
    loaded: LoadedModel,
    tasks: TaskSet,
    device: torch.device,
    *,
    batch_size: int = 8,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[TaskRecord]:
    """Score a causal language model on tasks, in their order.

    Args:
        loaded: model, moved to `device` and left there, and its tokenizer.
        tasks: from `find_tasks`.
        device: for the model.
        batch_size: sequences in a forward.
        group: ranks among which the items are distributed; all get the records of all items.

    Raises:
        ConfigError: without a tokenizer, for an empty batch, fewer items than processes, or when data cannot be fetched
            from the hub.
        NotFinite: when logits are NaN or infinite.
    """
    if loaded.tokenizer is None:
        raise ConfigError("Tasks need the model's tokenizer: pass it with the model.")
    if batch_size < 1:
        raise ConfigError(f"Batches of {batch_size} sequences hold nothing: give at least 1.")
    training = loaded.model.training
    for name, documents in (tasks.documents or {}).items():
        if len(documents) < group.size:
            raise ConfigError(
                f"Task {name} has {len(documents)} items for {group.size} processes: start fewer, or raise --limit."
            )
    try:
        with _isolated_lm_eval(), half_matmul_in_float32(device, loaded.model):
            scores = _run_lm_eval(loaded, tasks, device, batch_size=batch_size, group=group)
    except (OSError, ImportError) as error:
        if tasks.documents is not None:
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(
            f"Tasks {', '.join(tasks.names)} cannot be taken from the hub ({reason}): "
            "give local files with --task-data."
        ) from error
    finally:
        loaded.model.train(training)
    records: list[TaskRecord] = group.broadcast_from_main(
        lambda: [_record(loaded.name, name, scores) for name in scores["results"]]
    )
    return records


def local_task(name: str, documents: list[Document]) -> Any:
    """Make lm-eval's task object of documents in memory; nothing is written or fetched."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    definition = DEFINITIONS[name]
    return ConfigurableTask(
        config={
            "task": name,
            **definition.config,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "metric_list": [{"metric": metric} for metric in definition.metrics],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )


def _run_lm_eval(
    loaded: LoadedModel, tasks: TaskSet, device: torch.device, *, batch_size: int, group: ProcessGroup
) -> Any:
    from lm_eval.evaluator import simple_evaluate

    from alps.evaluation.distributed_lm import DistributedModel

    with _quiet_lm_eval():
        # Copied because lm-eval may add a padding token to the tokenizer.
        model = DistributedModel(
            group, loaded.model.to(device), copy.deepcopy(loaded.tokenizer), batch_size, loaded.name
        )
        items = tasks.documents.items() if tasks.documents else ()
        own_tasks = [local_task(name, documents) for name, documents in items]
    return simple_evaluate(
        model,
        tasks=own_tasks or list(tasks.names),
        task_manager=tasks.index,
        limit=tasks.limit if tasks.documents is None else None,
        bootstrap_iters=_RESAMPLES,
        log_samples=False,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )


def _record(model: str, task: str, scores: Mapping[str, Any]) -> TaskRecord:
    row: Mapping[str, Any] = scores["results"][task]
    metrics = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            metrics[name] = Estimate(value=value, stderr=error if isinstance(error, float) else None)
    return TaskRecord(
        model=model,
        task=task,
        metrics=metrics,
        items=scores["n-samples"].get(task, {}).get("effective"),
        num_fewshot=scores["n-shot"].get(task, 0),
        lm_eval=version("lm-eval"),
    )


@contextmanager
def _isolated_lm_eval() -> Iterator[None]:
    """Context in which lm-eval does not affect the process.

    lm-eval prints on stdout, which is for results; it forks to resample, which a process with a GPU must not do; and it
    draws names from the caller's random state.
    """
    before, state = os.environ.get("DISABLE_MULTIPROC"), random.getstate()
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(state)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Context without lm-eval's warnings about models and tasks in memory, which are intended. Later ones are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
