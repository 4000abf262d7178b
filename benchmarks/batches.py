"""Measure the best number of calibration tokens per forward of a block, with and without a competing process.

    python benchmarks/batches.py smollm2-135m --dtype float32

The two passes are those of `alps prune`: one collects the input statistics of the layers, one computes the inputs of
the next block. The competing process does the same work at the same time on another core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.calibration.input_statistics import observe
from alps.core.device import exact_float32
from alps.core.half_precision import half_matmul_in_float32
from alps.core.provenance import provenance
from alps.core.statistics import Needs
from alps.data.loaded_model import LoadedModel, open_model
from alps.models.blocks import on_device
from layers import ended_in_words, markdown

_CPU = torch.device("cpu")


def passes(loaded: LoadedModel, ids: Tensor, windows: int, count: int) -> float:
    """Return the seconds of both passes over the first `count` blocks, with `windows` windows at a time."""
    blocks = loaded.blocks()
    inputs = capture_block_inputs(loaded.model, blocks, ids, windows)
    start = time.perf_counter()
    for block in blocks[:count]:
        with on_device(block, _CPU):
            observe(block, inputs, Needs.GRAM, _CPU)
            inputs.advance(block.index, block.module, _CPU)
    return time.perf_counter() - start


def best(loaded: LoadedModel, options: argparse.Namespace, sizes: Sequence[int]) -> dict[int, float]:
    """Return the shortest time of each size over all rounds, in which the sizes take turns."""
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (options.windows, options.seqlen), generator=torch.Generator().manual_seed(0))
    fastest = dict.fromkeys(sizes, float("inf"))
    for _ in range(options.rounds):
        for size in sizes:
            fastest[size] = min(fastest[size], passes(loaded, ids, size, options.blocks))
    return fastest


def work_on(loaded: LoadedModel, options: argparse.Namespace, sizes: Sequence[int]) -> NoReturn:
    """Report the start on stdout, then work until the parent process ends or kills this one."""
    parent = os.getppid()
    print("at work", flush=True)
    while os.getppid() == parent:
        best(loaded, options, sizes)
    raise SystemExit(1)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = open_model(options.model, options.dtype)
    loaded.model.eval()
    sizes = [size for size in (1, 2, 4, 8) if size <= options.windows]
    with exact_float32(), half_matmul_in_float32(_CPU, loaded.model):
        if options.beside:
            work_on(loaded, options, sizes)
        alone = best(loaded, options, sizes)
        command = [sys.executable, __file__, *sys.argv[1:], "--beside"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as competitor:
            try:
                assert competitor.stdout is not None and competitor.stdout.readline(), "the competing process has ended"
                beside = best(loaded, options, sizes)
            finally:
                competitor.kill()
    facts, shape = provenance(), f"{options.windows} x {options.seqlen} tokens"
    print(
        f"{options.model}, {options.dtype}, {shape} through {options.blocks} blocks, seconds; {facts['machine']}, "
        f"torch {facts['torch']}, commit {facts['commit']}; alps takes {batch_tokens(loaded.blocks(), _CPU)} here\n"
    )
    rows = [[str(size * options.seqlen), f"{alone[size]:.2f}", f"{beside[size]:.2f}"] for size in sizes]
    print(markdown(["tokens at once", "alone", "beside another"], rows))


if __name__ == "__main__":
    ended_in_words(main)
