"""Row weights: how much each output channel of a layer counts, by its influence on the block's output.

legend  y    output of the dense block for one token                         (features,)
        z_j  output channel j of a site, of any token                        scalar
        r    a random direction, standard normal, drawn for each token       (features,)
        d_j  weight of channel j                                             scalar
ALPS minimises ||X (W_hat - W)^T||^2, in which all rows of W have equal weight. Here row j has weight d_j, the mean over
tokens of ||dy/dz_j||^2 / ||y||^2: the relative change of the block's output per unit of error in that channel. A
channel that the MLP's last layer uses little may lose more; a query channel of a peaked attention head may lose less.
The mean over r of (d<r, y>/dz_j)^2 is ||dy/dz_j||^2 (Hutchinson 1989), so one forward and one backward pass of the
block on a few thousand tokens give all weights. Rows share the Gram: scaled by sqrt(d_j) they are the same problem, and
every method that compares entries of different rows solves it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.core.distributed import ProcessGroup
from alps.models.blocks import Block
from alps.models.sites import Site

RowWeights = Literal["equal", "block-output"]
# Tokens that the weights are measured on: the mean of this number of squares is within a few per cent.
ROW_WEIGHT_TOKENS = 4096
# Lower bound relative to the mean weight: rows without influence stay part of the problem.
_MIN_WEIGHT = 1e-4


def compute_row_weights(
    block: Block, inputs: BlockInputs, device: torch.device, group: ProcessGroup
) -> dict[str, Tensor]:
    """Compute the row weights d (out,) of the layers of a dense block: float32 on `device`, mean 1, at least 1e-4.

    Layers that are not modules of their own, that are not called exactly once per window, or whose influence is zero or
    not finite are left out: their rows have equal weight.

    Args:
        block: dense, on `device`.
        inputs: its block inputs.
        device: device of the forward and backward passes.
        group: ranks that hold the other windows; all get the same weights, whatever their number.
    """
    sites = [site for site in block.sites if site.expert is None]
    sums = {site.name: torch.zeros(site.shape[0], dtype=torch.float64, device=device) for site in sites}
    for batch, window, number in _windows(inputs, group):
        # Seeded by the index of the window among those of all ranks.
        generator = torch.Generator().manual_seed(number)
        forward = partial(inputs.run, block.index, block.module, batch, device, window=window)
        for site, slope in zip(sites, _slopes(sites, forward, generator), strict=True):
            # NaN leaves the layer out, on every rank.
            sums[site.name] += math.nan if slope is None else slope.flatten(0, -2).double().square().sum(dim=0)
    weights = {}
    for name, local_sum in sums.items():
        total = group.all_reduce_sum(local_sum)
        mean = total.mean()
        if mean > 0 and bool(torch.isfinite(mean)):
            weights[name] = (total / mean).clamp_min(_MIN_WEIGHT).float()
    return weights


def _windows(inputs: BlockInputs, group: ProcessGroup) -> Iterator[tuple[int, int, int]]:
    """Yield batch, window in the batch, and index among all ranks' windows, for this rank's first windows."""
    limit = max(ROW_WEIGHT_TOKENS // inputs.window_tokens, 1)
    number = group.rank
    for batch, hidden in enumerate(inputs.hidden):
        for window in range(len(hidden)):
            if number >= limit:
                return
            yield batch, window, number
            number += group.size


def _slopes(sites: list[Site], forward: Callable[[], Tensor], generator: torch.Generator) -> list[Tensor | None]:
    """Return d<r, y/||y||>/dz of every layer for one window.

    It is None if a layer is not called exactly once, or gives outputs in groups, which have no rows of their own.
    """
    with torch.enable_grad(), _recorded_outputs(sites) as outputs:
        states = forward()
        directions = torch.randn(states.shape, generator=generator).to(states.device)
        sizes = states.detach().float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        along = (directions * states.float() / sizes).sum()
        once = [outputs[site.name][0] if len(outputs[site.name]) == 1 else None for site in sites]
        once = [
            z if z is not None and z.shape[-1] == site.shape[0] else None for z, site in zip(once, sites, strict=True)
        ]
        leaves = [z for z in once if z is not None]
        slopes = iter(torch.autograd.grad(along, leaves, allow_unused=True) if leaves and along.requires_grad else ())
    return [None if z is None else next(slopes, None) for z in once]


@contextmanager
def _recorded_outputs(sites: list[Site]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of the layers as leaves of the graph, while the context is open."""
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def hook(name: str) -> Callable[..., Tensor]:
        def after(_module: Any, _args: Any, output: Tensor) -> Tensor:
            # Nothing before the first layers needs a gradient: the graph begins at their outputs.
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            outputs[name].append(leaf)
            # A copy, since later code may write into it.
            return leaf.clone()

        return after

    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(hook(site.name))
            stack.callback(handle.remove)
        yield outputs
