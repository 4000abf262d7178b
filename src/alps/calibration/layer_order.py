"""The order in which the inputs of a block are observed: all at once, or each after the sites before it are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.input_statistics import Observation, discover, observe
from alps.calibration.moe_statistics import Peers
from alps.core.statistics import Needs
from alps.models.blocks import Block
from alps.models.sites import Site

Order = Literal["block", "sequential"]


def observations(
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    order: Order = "block",
    dense: DenseReference | None = None,
    peers: Peers | None = None,
) -> Iterator[Observation]:
    """What the sites of a block receive, to be pruned between one answer and the next.

    Args:
        block: the block, on `device`.
        inputs: hidden states and arguments of this block; a `CachedForward` continues where the last pass
            ended.
        needs: what to collect.
        device: where the forward runs and the sums live.
        order: `block` gives one answer; `sequential` one for every input, in the order of the forward (the inputs of
            all experts at once, first maps before second ones), and a last one for sites that the first batch did not
            reach.
        dense: the dense model's side, needed for `Needs.INPUT_SHIFT`.
        peers: processes that observe other windows, see `observe`.
    """
    if not block.sites:
        return
    wants_dense = dense is not None and needs >= Needs.INPUT_SHIFT
    if order == "block":
        if dense is not None and wants_dense:
            dense.record(_comparable(block.sites), device)
        yield observe(block, inputs, needs, device, dense=dense, peers=peers)
        return
    groups = _discovered(block, inputs, device, peers)
    if dense is not None and wants_dense:
        dense.record(_comparable([group[0] for group in groups]), device)
    steps: dict[str, list[Sequence[Site]]] = {}
    for group in groups:
        steps.setdefault(group[0].parameter_name, []).append(group)
    for step in steps.values():
        if isinstance(inputs, CachedForward):
            inputs.expect(step)
        yield observe(block, inputs, needs, device, step, dense, peers)
    found = {site.name for group in groups for site in group}
    if rest := [site for site in block.sites if site.name not in found]:
        if isinstance(inputs, CachedForward):
            inputs.expect([[site] for site in rest])
        yield observe(block.with_sites(rest), inputs, needs, device, dense=dense, peers=peers)


def _discovered(
    block: Block, inputs: BlockInputs, device: torch.device, peers: Peers | None
) -> Sequence[Sequence[Site]]:
    """What the first batch shows; with peers, what it shows the first of them."""
    if peers is None:
        return discover(block, inputs, device)
    sites = {site.name: site for site in block.sites}
    names = peers.broadcast_from_main(
        lambda: [[site.name for site in group] for group in discover(block, inputs, device)]
    )
    return [[sites[name] for name in group] for group in names]


def _comparable(sites: Sequence[Site]) -> list[Site]:
    """Those that receive the same tokens in the dense model; a router may send an expert others."""
    return [site for site in sites if site.expert is None]
