"""What the benchmarks of single layers share: inputs collected from the dense model, options, Markdown tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch

from alps.data.text import load_text
from alps.loaded import load
from alps.models.blocks import Block, find_blocks
from alps.models.capture import capture
from alps.models.observe import observe
from alps.models.starving import SharedInput
from alps.stats import Needs


def captured(options: argparse.Namespace, wanted: Callable[[Block], bool]) -> Iterator[SharedInput]:
    """Every distinct input of the blocks that are wanted, with its statistics in the dense model and its sites."""
    loaded, cpu = load(options.model), torch.device("cpu")
    text = load_text(options.calibration, "calibration")
    windows = loaded.calibration(text, options.samples, options.seqlen, options.seed)
    blocks = find_blocks(loaded.model)
    inputs = capture(loaded.model, blocks, windows.ids, max(4096 // options.seqlen, 1))
    left = sum(map(wanted, blocks))
    for block in blocks:
        if wanted(block):
            yield from observe(block, inputs, Needs.GRAM, cpu).shared
            left -= 1
        if not left:
            return
        with torch.no_grad():
            inputs.hidden = [inputs.run(block.index, block.module, i, cpu) for i in range(len(inputs.hidden))]


def calibration_options(parser: argparse.ArgumentParser, samples: int = 64) -> None:
    """The options that say what is pruned, and on which text."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
