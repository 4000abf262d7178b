"""How much each output channel of a site counts: by how far the block's output moves with it.

legend  y    output of the dense block for one token                         (features,)
        z_j  output channel j of a site, of any token                        scalar
        r    a random direction, standard normal, drawn anew for each token  (features,)
        d_j  weight of channel j                                             scalar
ALPS asks for min ||X (W_hat - W)^T||^2, in which all rows of W count alike. Here row j counts d_j, the mean over tokens
of ||dy/dz_j||^2 / ||y||^2: what the block's output, each token relative to its own size, makes of an error in that
channel. A channel of which the MLP's last map uses little may lose more, and a query's channel on which a sharp head
turns may lose less. The mean over r of (d<r, y>/dz_j)^2 is ||dy/dz_j||^2 (Hutchinson 1989), so that one forward and one
backward pass of the block on a few thousand tokens tell all of them. Rows share the Gram: scaled by sqrt(d_j) they are
the same problem, and every method that compares entries of different rows solves it unchanged.
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
# Tokens of the first windows that weights are read from: the mean of so many squares is within a few per cent.
ROW_WEIGHT_TOKENS = 4096
# Of the mean weight: rows that next to nothing depends on stay part of the problem.
_LEAST = 1e-4


def compute_row_weights(
    block: Block, inputs: BlockInputs, device: torch.device, group: ProcessGroup
) -> dict[str, Tensor]:
    """Weights d (out,) of the sites of a dense block, float32 on `device`, of mean 1 and at least 1e-4.

    Sites that are not modules of their own, are not called exactly once a window, or have no influence that can be told
    (none, or one that is not finite) are left out: their rows count alike.

    Args:
        block: dense, on `device`.
        inputs: what it receives.
        device: where to compute.
        group: processes that have other windows; all get the same weights, whatever their number.
    """
    sites = [site for site in block.sites if site.expert is None]
    sums = {site.name: torch.zeros(site.shape[0], dtype=torch.float64, device=device) for site in sites}
    for batch, window, number in _windows(inputs, group):
        # By the number that the window has among those of all processes.
        generator = torch.Generator().manual_seed(number)
        forward = partial(inputs.run, block.index, block.module, batch, device, window)
        for site, slope in zip(sites, _slopes(sites, forward, generator), strict=True):
            # NaN leaves the site out, in every process.
            sums[site.name] += math.nan if slope is None else slope.flatten(0, -2).double().square().sum(dim=0)
    weights = {}
    for name, mine in sums.items():
        total = group.all_reduce_sum(mine)
        mean = total.mean()
        if mean > 0 and bool(torch.isfinite(mean)):
            weights[name] = (total / mean).clamp_min(_LEAST).float()
    return weights


def _windows(inputs: BlockInputs, group: ProcessGroup) -> Iterator[tuple[int, int, int]]:
    """Batch, window in it, and number among all, of this process's share of the first windows."""
    wanted = max(ROW_WEIGHT_TOKENS // inputs.hidden[0].shape[1], 1)
    number = group.rank
    for batch, hidden in enumerate(inputs.hidden):
        for window in range(len(hidden)):
            if number >= wanted:
                return
            yield batch, window, number
            number += group.size


def _slopes(sites: list[Site], forward: Callable[[], Tensor], generator: torch.Generator) -> list[Tensor | None]:
    """d<r, y/||y||>/dz of every site for one window, None where it is not called once."""
    with torch.enable_grad(), _watched(sites) as outputs:
        states = forward()
        directions = torch.randn(states.shape, generator=generator).to(states.device)
        sizes = states.detach().float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        along = (directions * states.float() / sizes).sum()
        once = [outputs[site.name][0] if len(outputs[site.name]) == 1 else None for site in sites]
        asked = [z for z in once if z is not None]
        found = iter(torch.autograd.grad(along, asked, allow_unused=True) if asked and along.requires_grad else ())
    return [None if z is None else next(found, None) for z in once]


@contextmanager
def _watched(sites: list[Site]) -> Iterator[dict[str, list[Tensor]]]:
    """What every site gives for the time of the body, as something to differentiate by."""
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def hook(name: str) -> Callable[..., Tensor]:
        def after(_module: Any, _args: Any, output: Tensor) -> Tensor:
            # Nothing before the first sites needs a gradient: their outputs are where the graph begins.
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            outputs[name].append(leaf)
            # A copy, since what follows may write into it.
            return leaf.clone()

        return after

    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(hook(site.name))
            stack.callback(handle.remove)
        yield outputs
