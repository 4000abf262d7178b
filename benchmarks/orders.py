"""Measure the cost of true-sequential order: seconds of forward passes without it, and with it in two ways.

    python benchmarks/orders.py smollm2-135m --dtype bfloat16

The passes are those of `alps prune`: what observes the inputs, and the step to the next block; sums are left out, and
so is pruning, here by magnitude. Sequential passes begin at the start of the block, or go on behind what is pruned of
it, as alps does.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.layer_order import calibrate
from alps.core.device import exact_float32
from alps.core.half_precision import half_matmul_in_float32
from alps.core.provenance import provenance
from alps.core.statistics import Needs
from alps.data.loaded_model import LoadedModel, open_model
from alps.models.blocks import on_device
from alps.solvers.patterns import Unstructured, keep_largest
from alps.solvers.topk import apply_mask
from layers import ended_in_words, markdown

_CPU = torch.device("cpu")
_CUT = Unstructured(0.7)
# Whether layers are solved one after the other, and whether passes start behind those that are solved.
_WAYS = [(False, False), (True, False), (True, True)]


def passes(loaded: LoadedModel, ids: Tensor, count: int, sequential: bool, resumed: bool, target: bool) -> float:
    """Seconds of all forward passes over the first blocks."""
    blocks, seconds = loaded.blocks(), 0.0
    inputs = capture_block_inputs(loaded.model, blocks, ids, max(batch_tokens(blocks, _CPU) // ids.shape[1], 1))
    dense = DenseReference.start(inputs, needed=target)
    for block in blocks[:count]:
        with on_device(block, _CPU):
            dense.begin_block(block)
            weights = {site.name: site.read().clone() for site in block.sites}
            start = time.perf_counter()
            rest = CachedForward(block, inputs, _CPU) if resumed else inputs
            needs = Needs.INPUT_SHIFT if target else Needs.GRAM
            for seen in calibrate(block, rest, needs, _CPU, true_sequential=sequential, reference=dense):
                seconds += time.perf_counter() - start - seen.seconds
                for site in (site for shared in seen.shared for site in shared.sites):
                    site.write(apply_mask(site.read(), keep_largest(site.read().abs(), _CUT)))
                start = time.perf_counter()
            rest.advance(block.index, block.module, _CPU)
            dense.advance(_CPU)
            seconds += time.perf_counter() - start
            for site in block.sites:
                site.write(weights[site.name])
    return seconds


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=1, help="of which the shortest times are shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = open_model(options.model, options.dtype)
    loaded.model.eval()
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (options.windows, options.seqlen), generator=torch.Generator().manual_seed(0))
    rows = []
    with exact_float32(), half_matmul_in_float32(_CPU, loaded.model), torch.no_grad():
        for target in (False, True):
            found = [
                [passes(loaded, ids, options.blocks, *way, target) for way in _WAYS] for _ in range(options.rounds)
            ]
            rows.append(["dense" if target else "pruned", *(f"{min(times):.2f}" for times in zip(*found, strict=True))])
    facts, shape = provenance(), f"{options.windows} x {options.seqlen} random tokens"
    print(
        f"{options.model}, {options.dtype}, {shape} through {options.blocks} blocks, seconds of forward passes, one "
        f"thread; {facts['machine']}, torch {facts['torch']}, commit {facts['commit']}\n"
    )
    print(markdown(["target", "block order", "sequential, from the start", "sequential, going on"], rows))


if __name__ == "__main__":
    ended_in_words(main)
