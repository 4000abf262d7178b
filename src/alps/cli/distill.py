"""`alps distill` and `alps reconstruct`: training of the kept weights after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alps.cli.console import console_output
from alps.cli.options import config_options
from alps.core.settings import COMMAND_LINE, make_config
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.reconstruct_config import ReconstructConfig

_Dense = Annotated[str, typer.Argument(metavar="DENSE", help="The dense model, as MODEL of `alps prune`.")]
_Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="A directory pruned from it, by any program.")]
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create for the tuned checkpoint.")]


@config_options(DistillConfig)
def distill_command(dense: _Dense, pruned: _Pruned, out: _Out, values: dict[str, Any]) -> None:
    """Train the kept weights of PRUNED towards DENSE by distillation, and write OUT; zeros stay zero. Not one-shot."""
    config = make_config(DistillConfig, values, COMMAND_LINE)
    from alps.cli.tables import distillation_summary
    from alps.finetuning.distillation import distill_directory

    with console_output() as (console, progress):
        report = distill_directory(dense, pruned, out, config, progress)
        console.print(distillation_summary(report, out), soft_wrap=True)


@config_options(ReconstructConfig)
def reconstruct_command(dense: _Dense, pruned: _Pruned, out: _Out, values: dict[str, Any]) -> None:
    """Tune the kept weights of PRUNED, block by block, to DENSE's block outputs, and write OUT; zeros stay zero."""
    config = make_config(ReconstructConfig, values, COMMAND_LINE)
    from alps.cli.tables import reconstruction_summary
    from alps.finetuning.reconstruct_checkpoint import reconstruct_directory

    with console_output() as (console, progress):
        report = reconstruct_directory(dense, pruned, out, config, progress)
        console.print(reconstruction_summary(report, out), soft_wrap=True)
