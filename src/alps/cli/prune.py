"""`alps prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alps.cli.console import console_output
from alps.cli.tables import prune_summary
from alps.core.distributed import process_group, require_single_process
from alps.pruning.config import load_prune_config
from alps.pruning.dry_run import forecast_summary
from alps.pruning.job import estimate_run, prune_directory
from alps.pruning.presets import PRESETS
from alps.pruning.sparsity_allocation import ALLOCATIONS
from alps.solvers import METHODS


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
    match_target: Annotated[
        str | None,
        typer.Option(help="What --match aims at: pruned, dense, or a share in between.  [by preset]"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help=f"Where the zeros go: {', '.join(ALLOCATIONS)}.  [by preset]")
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="What the rows of a layer count: equal, or block-output: by the block's output.  [by preset]"
        ),
    ] = None,
    keep_dense: Annotated[
        str | None, typer.Option(help="Names of what stays dense, with *: 'model.layers.0.*,*.down_proj'.")
    ] = None,
    respect_zeros: Annotated[
        bool | None, typer.Option("--respect-zeros", help="Zeros that MODEL has stay zero, and count.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRESETS)}; best wants 131,072 tokens or more.")
    ] = None,
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
    activation_memory: Annotated[
        float | None,
        typer.Option(help="GiB of activations to keep in memory; more than that waits in files beside OUT."),
    ] = None,
    errors: Annotated[
        bool | None,
        typer.Option("--errors/--no-errors", help="Measure every site's error.  [default: errors]"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be pruned, and estimates of memory and time; write nothing."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Only go on with an unfinished run; the same command does so anyway."),
    ] = False,
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
        "order": order,
        "target": target,
        "match": match,
        "match_target": match_target,
        "budget": budget,
        "channels": channels,
        "keep_dense": keep_dense,
        "respect_zeros": respect_zeros,
        "preset": preset,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "activation_memory": activation_memory,
        "errors": errors,
    }
    if dry_run:
        require_single_process("prune --dry-run")
    with process_group() as group, console_output(quiet=not group.is_main) as (console, progress):
        settings = load_prune_config(config, given)
        if dry_run:
            console.print(forecast_summary(estimate_run(settings, out)), soft_wrap=True, highlight=False, markup=False)
            return
        report = prune_directory(settings, out, progress, resume, group)
        console.print(prune_summary(report, out), soft_wrap=True)
