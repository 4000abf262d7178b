"""`alps generate`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from alps.cli.console import console_output, cpu_contention
from alps.cli.options import Device, Dtype
from alps.core.errors import ConfigError

_LOG = logging.getLogger("alps")


def generate_command(
    path: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory of `alps pack`, or MODEL as in `alps prune`.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="NUMBER", help="0 takes the most likely token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a text with a packed or dense model: text to stdout as it comes, speed and memory to stderr."""
    from alps.data.loaded_model import load
    from alps.inference.text_generation import generate_text, summary

    def write_text(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with console_output():
        loaded = load(path, dtype, device=device)
        if loaded.tokenizer is None:
            raise ConfigError(f"Model '{path}' has no tokenizer, which generation needs: add its files.")
        contention = cpu_contention()
        result = generate_text(
            loaded.model,
            loaded.tokenizer,
            prompt,
            tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            on_text=write_text,
        )
        write_text("\n")
        others = contention.describe()
        _LOG.info(summary(loaded.model, result) + (f" The machine is busy: {others}." if others else ""))
