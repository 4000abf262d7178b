"""Collect the inputs of a block's layers: all at once, or one by one while earlier layers are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.input_statistics import Observation, discover, observe
from alps.calibration.moe_statistics import LayerInput
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.statistics import InputSums, Needs
from alps.models.blocks import Block
from alps.models.sites import Site


def calibrate(
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    *,
    true_sequential: bool = False,
    reference: DenseReference | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Observation]:
    """Yield the input statistics of a block's layers; the caller prunes these layers before it takes the next ones.

    Args:
        block: on `device`.
        inputs: of the block. They have no batches if the method reads no inputs. A `CachedForward` reuses the outputs
            of submodules that are already pruned.
        needs: statistics to collect.
        device: where the forward runs and the sums are kept.
        true_sequential: yield the inputs one by one in the order of the forward, and then those that the first batch
            did not reach. The inputs of all experts' first projections are one step, those of the second ones another.
            Otherwise yield once.
        reference: activations of the dense model, needed for `Needs.INPUT_SHIFT`.
        group: ranks that observe other windows, see `observe`.
    """
    if not block.sites:
        return
    if not inputs.hidden:
        yield _without_inputs(block, device)
        return
    if needs < Needs.INPUT_SHIFT:
        reference = None
    if not true_sequential:
        if reference is not None:
            reference.record(_comparable(block.sites), device)
        yield observe(block, inputs, needs, device, reference=reference, group=group)
        return
    shared_inputs = _discover_on_main(block, inputs, device, group)
    if reference is not None:
        reference.record(_comparable([sites[0] for sites in shared_inputs]), device)
    steps: dict[str, list[Sequence[Site]]] = {}
    for sites in shared_inputs:
        steps.setdefault(sites[0].place, []).append(sites)
    for step in steps.values():
        if isinstance(inputs, CachedForward):
            inputs.begin_pass(step)
        yield observe(block, inputs, needs, device, groups=step, reference=reference, group=group)
    discovered = {site.name for sites in shared_inputs for site in sites}
    if late := [site for site in block.sites if site.name not in discovered]:
        if isinstance(inputs, CachedForward):
            inputs.begin_pass([[site] for site in late])
        yield observe(block.with_sites(late), inputs, needs, device, reference=reference, group=group)


def _without_inputs(block: Block, device: torch.device) -> Observation:
    """Return empty sums for each site."""
    inputs = [LayerInput(InputSums.zeros(site.shape[1], Needs.NOTHING, device), [site]) for site in block.sites]
    return Observation(inputs, [], 0.0)


def _discover_on_main(
    block: Block, inputs: BlockInputs, device: torch.device, group: ProcessGroup
) -> Sequence[Sequence[Site]]:
    """Group the sites by their shared input, as seen in the first batch of the main rank."""
    sites = {site.name: site for site in block.sites}
    names = group.broadcast_from_main(
        lambda: [[site.name for site in shared] for shared in discover(block, inputs, device)]
    )
    return [[sites[name] for name in shared] for shared in names]


def _comparable(sites: Sequence[Site]) -> list[Site]:
    """Return the sites that receive the same tokens in the dense model; routers may send experts different ones."""
    return [site for site in sites if not site.is_expert]
