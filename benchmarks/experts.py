"""Measure the pooling of experts with few tokens: held-out error over tokens and `MIN_TOKENS_PER_INPUT`.

No trained mixture of experts is needed: the inputs of one block of a dense model are sent to the two nearest of eight
centres, and a map is pruned for each centre on so many of the tokens that went there, filled up from all tokens. The
error is taken on the tokens of the centre that were left out.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.dense_reference import input_hooks
from alps.core.statistics import InputStats, InputSums, relative_error
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.models.blocks import find_blocks
from alps.solvers import get_method
from alps.solvers.patterns import Unstructured
from layers import calibration_options, markdown

_CENTRES, _CHOSEN, _MEASURED = 8, 2, 4
_TOKENS = (0.25, 1.0, 2.0, 4.0, 8.0)
_ENOUGH = (0, 1, 2, 4, 8, 16)


def received(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and inputs (tokens, in) of the maps before and after the activation, in one block."""
    loaded = load(options.model, "float32")
    text = load_text(options.calibration, "calibration")
    windows = loaded.calibration(text, options.samples, options.seqlen, options.seed)
    blocks = find_blocks(loaded.model)
    inputs = capture_block_inputs(loaded.model, blocks, windows.ids, max(4096 // options.seqlen, 1))
    for block in blocks[: options.block]:
        inputs.advance(block.index, block.module, torch.device("cpu"))
    block = blocks[options.block]
    found: dict[str, list[Tensor]] = {}
    sites = {site.kind: site for site in block.sites if site.kind in ("gate_proj", "down_proj")}
    with (
        torch.no_grad(),
        input_hooks([*sites.values()], lambda s, x: found.setdefault(s.kind, []).append(x.flatten(0, -2))),
    ):
        for batch in range(len(inputs.hidden)):
            inputs.run(block.index, block.module, batch, torch.device("cpu"))
    return {kind: (sites[kind].read().clone(), torch.cat(found[kind])) for kind in sites}


def routing(x: Tensor, seed: int) -> Tensor:
    """The nearest of some centres, found by k-means, for every token: (tokens, chosen)."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:_CENTRES]]
    for _ in range(20):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        centres = torch.stack(
            [x[nearest == i].mean(dim=0) if bool((nearest == i).any()) else centres[i] for i in range(_CENTRES)]
        )
    return torch.cdist(x, centres).topk(_CHOSEN, largest=False).indices


def row(W: Tensor, x: Tensor, chosen: Tensor, share: float, options: argparse.Namespace) -> list[str]:
    """Mean held-out error over centres at `share` tokens per input, for every value of `MIN_TOKENS_PER_INPUT`."""
    method, pool, width = get_method("alps"), InputSums.of(x), W.shape[1]
    tokens, cells = int(share * width), []
    for enough in _ENOUGH:
        errors = []
        for centre in range(_MEASURED):
            mine = x[(chosen == centre).any(dim=1)]
            mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(centre))]
            if len(mine) < 2 * tokens:
                continue
            sums = InputSums.of(mine[:tokens])
            if enough * width > tokens:
                sums = sums + pool.rescaled(enough * width - tokens)
            answer = method.solve(W, method.prepare(sums.to_stats()), Unstructured(options.sparsity)).weight
            errors.append(relative_error(answer, W, InputStats.of(mine[tokens:])))
        cells.append(f"{sum(errors) / len(errors):.4f}" if errors else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    calibration_options(parser)
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.6)
    options = parser.parse_args()
    maps = received(options)
    chosen = routing(maps["gate_proj"][1], options.seed)
    rows = [
        [f"{kind}, {share:g}", *row(W, x, chosen, share, options)] for kind, (W, x) in maps.items() for share in _TOKENS
    ]
    print(markdown(["map, tokens for each input", *(f"c = {enough}" for enough in _ENOUGH)], rows))


if __name__ == "__main__":
    main()
