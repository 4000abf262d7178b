"""`alps recover` and `alps match`: weights that change after pruning, while the zeros stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alps.cli.console import console_output
from alps.cli.tables import match_summary, recovery_summary


def distill(
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
    from alps.finetuning.distillation import distill_directory, load_distill_config

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
    with console_output() as (console, progress):
        report = distill_directory(dense, pruned, out, load_distill_config(given), progress)
        console.print(recovery_summary(report, out), soft_wrap=True)


def match_command(
    dense: Annotated[str, typer.Argument(help="The dense model, as MODEL of `alps prune`.")],
    pruned: Annotated[str, typer.Argument(help="A directory that was pruned from it, by anything.")],
    out: Annotated[Path, typer.Argument(help="Directory to create for the matched checkpoint.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the windows.  [default: 1]")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="pruned (what DENSE's block makes of what PRUNED's receives), dense (its own outputs), or a share "
            "between 0 and 1.  [default: dense]"
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Largest step size of Adam.  [default: 3e-4]")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="As in `alps prune`; self is sampled from DENSE.  [default: c4]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows; the last are held back.  [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each.  [default: 2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws and shuffles the windows.  [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.  [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the checkpoints'), float32, bfloat16, float16.  [default: auto]")
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload", help="Keep activations on the CPU between blocks.")
    ] = None,
) -> None:
    """Tune the kept weights of PRUNED, block by block, to the outputs of DENSE's blocks, and write OUT; zeros stay."""
    from alps.finetuning.reconstruct_checkpoint import load_reconstruct_config, reconstruct_directory

    given: dict[str, Any] = {
        "epochs": epochs,
        "target": target,
        "rate": rate,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "offload": offload,
    }
    with console_output() as (console, progress):
        report = reconstruct_directory(dense, pruned, out, load_reconstruct_config(given), progress)
        console.print(match_summary(report, out), soft_wrap=True)
