"""`alps pack` and `alps unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alps.cli.console import console_output


def pack_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A pruned checkpoint directory with safetensors files.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create for the packed files.")],
    compress: Annotated[
        bool,
        typer.Option(
            "--compress", help="Also compress the files with zstd, for transport; needs the package zstandard."
        ),
    ] = False,
) -> None:
    """Store the checkpoint in DIR without its zeros; `alps unpack` restores it to the bit."""
    from alps.cli.tables import pack_summary
    from alps.inference.api import pack

    with console_output() as (console, _):
        console.print(pack_summary(pack(directory, out, compress=compress), out), soft_wrap=True)


def unpack_command(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="A directory written by `alps pack`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create for the checkpoint.")],
) -> None:
    """Restore the ordinary, dense checkpoint from PACKED, and check every hash."""
    from alps.cli.tables import unpack_summary
    from alps.inference.api import unpack

    with console_output() as (console, _):
        console.print(unpack_summary(unpack(packed, out), out), soft_wrap=True)
