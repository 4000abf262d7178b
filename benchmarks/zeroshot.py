"""Zero-shot accuracy of checkpoints: one JSON line a checkpoint and task, a Markdown table at the end.

A task that is already in the results file for a checkpoint and limit is not scored again. Needs lm-eval. Example:

    python benchmarks/zeroshot.py smollm2-135m pruned-alps pruned-wanda --task-data zeroshot --results zeroshot.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from alps.core.provenance import provenance
from alps.data.loaded_model import LoadedModel, load
from alps.evaluation.api import evaluate_tasks

Run = dict[str, Any]


def main() -> None:
    """Score what is missing, then print the table of what was asked for."""
    options = _options()
    path, tasks = Path(options.results), options.tasks.split(",")
    for model in options.models:
        loaded: LoadedModel | None = None
        for task in tasks:
            key = {"model": model, "task": task, "limit": options.limit}
            if not any(key.items() <= row.items() for row in _read(path)):
                loaded = loaded or load(model, options.dtype)
                with path.open("a") as file:
                    file.write(json.dumps(key | measure(options, loaded, task)) + "\n")
    print(table([row for row in _read(path) if row["limit"] == options.limit], options.models, tasks))


def measure(options: argparse.Namespace, loaded: LoadedModel, task: str) -> Run:
    """One task of one checkpoint; what it was measured with travels with the figures."""
    start = time.perf_counter()
    records = evaluate_tasks(
        loaded,
        [task],
        task_data=options.task_data,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
    )
    found = {record.task: record for record in records}[task].model_dump()
    return {**found, "seconds": time.perf_counter() - start, "versions": provenance()}


def table(rows: list[Run], models: list[str], tasks: list[str]) -> str:
    """Accuracy of every checkpoint in every task with its standard error, and their mean, in per cent."""
    found = {(row["model"], row["task"]): row for row in rows}
    items = [str(found[models[0], task]["items"]) for task in tasks]
    lines = [
        f"| checkpoint | {' | '.join(tasks)} | mean |",
        "|---|" + "---:|" * (len(tasks) + 1),
        f"| items | {' | '.join(items)} | |",
    ]
    for model in models:
        scores = [found[model, task]["metrics"]["acc"] for task in tasks]
        errors = [score["stderr"] or 0.0 for score in scores]
        mean = sum(score["value"] for score in scores) / len(scores)
        spread = math.sqrt(sum(error**2 for error in errors)) / len(scores)
        cells = [_cell(value, error) for value, error in zip([score["value"] for score in scores], errors, strict=True)]
        lines.append(f"| {model} | {' | '.join(cells)} | {_cell(mean, spread)} |")
    return "\n".join(lines)


def _cell(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints, the dense one first")
    parser.add_argument("--tasks", default="lambada_openai,piqa,arc_easy,hellaswag,winogrande")
    parser.add_argument("--task-data", help="folder of local items; without it lm-eval's, from the hub")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--results", default="zeroshot.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
