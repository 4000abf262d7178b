"""How many calibration tokens a forward of a block is to take: seconds of two passes, alone and beside a neighbour.

    python benchmarks/batches.py smollm2-135m --dtype float32

The passes are those of `alps prune`: one that sums what the sites receive, one to the next block. The neighbour is a
process that does the same work at the same time, on a core of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from torch import Tensor

from alps.errors import ConfigError
from alps.halves import fast_halves
from alps.loaded import Loaded, open_model
from alps.models.blocks import on_device
from alps.models.capture import batch_tokens, capture
from alps.models.observe import observe
from alps.runtime import exact_float32, provenance
from alps.stats import Needs
from layers import markdown

_CPU = torch.device("cpu")


def passes(loaded: Loaded, ids: Tensor, windows: int, count: int) -> float:
    """Seconds of both passes over the first blocks, so many windows at a time."""
    blocks = loaded.blocks()
    inputs = capture(loaded.model, blocks, ids, windows)
    start = time.perf_counter()
    for block in blocks[:count]:
        with on_device(block, _CPU):
            observe(block, inputs, Needs.GRAM, _CPU)
            inputs.advance(block.index, block.module, _CPU)
    return time.perf_counter() - start


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
    vocabulary = loaded.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (options.windows, options.seqlen), generator=torch.Generator().manual_seed(0))
    sizes = [size for size in (1, 2, 4, 8) if size <= options.windows]

    def best(found: dict[int, float]) -> dict[int, float]:
        """The shorter times of one more round."""
        return {size: min(found.get(size, float("inf")), passes(loaded, ids, size, options.blocks)) for size in sizes}

    with exact_float32(), fast_halves(_CPU, loaded.model):
        while options.beside:
            best({})
        alone: dict[int, float] = {}
        beside: dict[int, float] = {}
        for _ in range(options.rounds):
            alone = best(alone)
        other = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--beside"])
        try:
            best({})  # the other one starts meanwhile
            for _ in range(options.rounds):
                beside = best(beside)
        finally:
            other.kill()
            other.wait()
    facts, shape = provenance(), f"{options.windows} x {options.seqlen} tokens"
    print(
        f"{options.model}, {options.dtype}, {shape} through {options.blocks} blocks, seconds; {facts['machine']}, "
        f"torch {facts['torch']}, commit {facts['commit']}; alps takes {batch_tokens(loaded.blocks(), _CPU)} here\n"
    )
    rows = [[str(size * options.seqlen), f"{alone[size]:.2f}", f"{beside[size]:.2f}"] for size in sizes]
    print(markdown(["tokens at once", "alone", "beside another"], rows))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
