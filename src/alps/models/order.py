"""The order in which the inputs of a block are observed: all at once, or each after the sites before it are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from alps.models.blocks import Block
from alps.models.capture import BlockInputs
from alps.models.observe import Observation, discover, observe
from alps.models.streams import DenseStream
from alps.stats import Needs

Order = Literal["block", "sequential"]


def observations(
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    order: Order = "block",
    dense: DenseStream | None = None,
) -> Iterator[Observation]:
    """What the sites of a block receive, to be pruned between one answer and the next.

    Args:
        block: the block, on `device`.
        inputs: hidden states and arguments of this block.
        needs: what to collect.
        device: where the forward runs and the sums live.
        order: `block` gives one answer; `sequential` one for every input, in the order of the forward, and a last one
            for sites that the first batch did not reach.
        dense: the dense model's side, needed for `Needs.DRIFT`.
    """
    wants_dense = dense is not None and needs >= Needs.DRIFT
    if order == "block":
        if dense is not None and wants_dense:
            dense.record(block.sites, device)
        yield observe(block, inputs, needs, device, dense=dense)
        return
    groups = discover(block, inputs, device)
    if dense is not None and wants_dense:
        dense.record([group[0] for group in groups], device)
    for group in groups:
        yield observe(block, inputs, needs, device, [group], dense)
    found = {site.name for group in groups for site in group}
    if rest := [site for site in block.sites if site.name not in found]:
        yield observe(Block(block.index, block.name, block.module, rest), inputs, needs, device, dense=dense)
