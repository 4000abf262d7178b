"""The same measurements as the command line's, for Python: perplexity, divergence and tasks of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alps.distributed import Group
from alps.evaluation.divergence import divergence
from alps.evaluation.perplexity import perplexity
from alps.evaluation.records import EvaluationRecord, TaskRecord
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.loaded import Loaded
from alps.progress import Watcher
from alps.runtime import pick_device


def evaluate(
    loaded: Loaded,
    texts: Sequence[str],
    seqlen: int = 2048,
    windows: int | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    reference: Loaded | None = None,
    group: Group | None = None,
) -> list[EvaluationRecord]:
    """Perplexity of a loaded model on each text; see `alps.evaluation.perplexity` for the convention.

    Args:
        reference: the dense model, to compare with on the same windows: every record is then a `ComparisonRecord`,
            see `alps.evaluation.divergence`.
        group: processes that share out the windows, each with the same arguments.

    Raises:
        ConfigError: for a text that is missing or too short, windows longer than the model takes, or a reference with
            another tokenizer or vocabulary.
    """
    group = group or Group()
    place = group.device(device, pick_device(device))
    cut = [loaded.evaluation(text, seqlen, windows) for text in texts]
    if reference is None:
        return [perplexity(loaded.model, one, loaded.name, place, watcher, group) for one in cut]
    for one, text in zip(cut, texts, strict=True):
        reference.check_same(one, text, windows)
    names = (loaded.name, reference.name)
    return [divergence(loaded.model, reference.model, one, names, place, watcher, group) for one in cut]


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    task_data: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
) -> list[TaskRecord]:
    """Zero-shot accuracies of a loaded model, by lm-eval (`pip install lm-eval accelerate`).

    Args:
        tasks: names; with `task_data` those of `alps.evaluation.definitions.DEFINITIONS`, else lm-eval's own.
        task_data: folder of local files, NAME.jsonl for every task; nothing is then fetched.
        limit: score only the first items of each task.
        batch_size: sequences in a forward.

    Raises:
        ConfigError: for an unknown task, data that cannot be used or fetched, or without lm-eval or a tokenizer.
    """
    place = pick_device(device)
    found = find_tasks(tasks, None if task_data is None else Path(task_data), limit)
    return score_tasks(loaded, found, place, batch_size)
