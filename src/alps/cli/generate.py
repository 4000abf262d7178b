"""`alps generate`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from alps.cli.console import console_output

_LOG = logging.getLogger("alps")


def generate_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="What `alps pack` wrote, or MODEL as of `alps prune`.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Generate at most N tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda:N or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Continue a text, packed layers staying packed: text to stdout as it comes, speed and memory to stderr."""
    from alps.inference.load import load
    from alps.inference.text_generation import generate_text, summary
    from alps.models.demo_model import resolve_model_path
    from alps.models.load import load_tokenizer

    with console_output():
        place = resolve_model_path(path)
        model, tokenizer = load(place, device, dtype), load_tokenizer(place)

        def write_text(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        result = generate_text(
            model, tokenizer, prompt, tokens, temperature=temperature, seed=seed, chat=chat, on_text=write_text
        )
        write_text("\n")
        _LOG.info(summary(model, result))
