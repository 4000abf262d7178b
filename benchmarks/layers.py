"""Shared parts of the benchmarks: inputs of the dense model, optimal weights, options, Markdown tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.input_statistics import observe
from alps.calibration.moe_statistics import LayerInput
from alps.core.errors import AlpsError
from alps.core.provenance import provenance
from alps.core.statistics import InputStats, Needs
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.models.blocks import Block, find_blocks
from alps.solvers import Method
from alps.solvers.hessian import damped
from alps.solvers.patterns import Pattern

Problem = tuple[Tensor, InputStats]


def captured(options: argparse.Namespace, wanted: Callable[[Block], bool]) -> Iterator[LayerInput]:
    """Every distinct input of the blocks that are wanted, with its statistics in the dense model and its sites."""
    loaded, cpu = load(options.model), torch.device("cpu")
    text = load_text(options.calibration, "calibration")
    windows = loaded.calibration(text, options.samples, options.seqlen, options.seed)
    blocks = find_blocks(loaded.model)
    inputs = capture_block_inputs(loaded.model, blocks, windows.ids, max(4096 // options.seqlen, 1))
    left = sum(map(wanted, blocks))
    for block in blocks:
        if wanted(block):
            yield from observe(block, inputs, Needs.GRAM, cpu).shared
            left -= 1
        if not left:
            return
        with torch.no_grad():
            inputs.hidden = [inputs.run(block.index, block.module, i, cpu) for i in range(len(inputs.hidden))]


def layer_problems(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Problem]:
    """By name: a site's dense weight (out, in) in float32, and the statistics of its inputs in the dense model."""
    found: dict[str, Problem] = {}
    for shared in captured(options, lambda block: any(site.name in names for site in block.sites)):
        stats = shared.sums.into_stats()
        for site in shared.sites:
            if site.name in names:
                found[site.name] = site.read().float().clone(), stats
    for name in names:
        if name not in found:
            raise SystemExit(f"no site {name}: try one such as model.layers.0.self_attn.k_proj")
    return {name: found[name] for name in names}


def support(method: Method, problem: Problem, pattern: Pattern) -> Tensor:
    """The entries (out, in) that a method keeps."""
    weight, stats = problem
    return method.solve(weight, method.prepare(stats), pattern).mask


def exact_weights(problem: Problem, mask: Tensor, damping: float = 0.01) -> Tensor:
    """The optimal weights on a support: one float64 solve of H_SS x = (W H)_S for every row."""
    weight, stats = problem
    H = damped(stats, damping)[0].double()
    C = weight.double() @ H
    result = torch.zeros_like(C)
    for row, kept_here in enumerate(mask):
        kept = kept_here.nonzero().squeeze(1)
        result[row, kept] = torch.linalg.solve(H[kept][:, kept], C[row, kept])
    return result.float()


def origin(options: argparse.Namespace) -> str:
    """Describe the inputs of the layer problems and the machine in one line."""
    facts = provenance()
    return (
        f"{options.model}, {options.samples} x {options.seqlen} tokens of {options.calibration}, seed {options.seed}, "
        f"{facts['machine']}, torch {facts['torch']}, commit {facts['commit']}"
    )


def calibration_options(parser: argparse.ArgumentParser, samples: int = 64) -> None:
    """The options that say what is pruned, and on which text."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)


def ended_in_words(main: Callable[[], None], *others: type[Exception]) -> None:
    """Run a script, and end it with one sentence and exit code 2 where the user is mistaken, or on one of `others`."""
    mistakes: tuple[type[Exception], ...] = (AlpsError, *others)
    try:
        main()
    except mistakes as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
