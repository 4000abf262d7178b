"""Collect the input statistics of a block's sites; sites fed by the same tensor share one record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs, Structure
from alps.calibration.dense_reference import DenseReference, StopForward, input_hooks
from alps.calibration.moe_statistics import LayerInput, augment_undersampled
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import UnsupportedModel
from alps.core.statistics import InputSums, Needs
from alps.models.blocks import Block
from alps.models.sites import Site


@dataclass
class Observation:
    """What one pass over the calibration batches saw.

    Attributes:
        shared: the distinct inputs, in the order in which they appear in the forward.
        unused: sites that received nothing.
        seconds: time spent summing statistics, a part of the pass.
    """

    shared: list[LayerInput]
    unused: list[Site]
    seconds: float


class _Collector:
    """Hooks for one pass: a site's first batch finds out whose input it shares, later ones watch one site per input."""

    def __init__(
        self, needs: Needs, device: torch.device, groups: Sequence[Sequence[Site]] = (), last: int | None = None
    ) -> None:
        self.needs, self.device, self._last = needs, device, last
        self.shared: list[LayerInput] = []
        # By the name of a site, its input.
        self._owner: dict[str, LayerInput] = {}
        for group in groups:
            self._begin(group)
        self.seconds = 0.0
        # What the dense model's sites receive in this batch.
        self.dense: dict[str, list[Tensor]] = {}
        # How often each input's first site has received something in this batch.
        self._received: dict[str, int] = {}
        self.may_stop = bool(groups)  # whether a batch may end at its last input
        self._shape = torch.Size()  # windows and tokens of this batch
        # Inputs of this batch that met a new site; held, so that identity means the same tensor.
        self._met: list[tuple[Tensor, LayerInput]] = []

    def knows(self, site: Site) -> bool:
        """Whether a site has received something."""
        return site.name in self._owner

    def first(self, site: Site, x: Tensor) -> None:
        """A site that was not known when the batch began receives `x`.

        Raises:
            AllSeen: when every site was met in the first batch, and none is called again.
        """
        self._meet(site, x)
        if len(self._owner) == self._last:
            raise StopForward

    def _meet(self, site: Site, x: Tensor) -> None:
        owner = self._owner.get(site.name)
        if owner is None:
            for tensor, shared in self._met:
                if tensor is x:
                    shared.sites.append(site)
                    self._owner[site.name] = shared
                    return
            owner = self._begin([site])
        self._met.append((x, owner))
        self._add(owner, x)

    def later(self, site: Site, x: Tensor) -> None:
        """The first site of a known input receives `x`.

        Raises:
            AllSeen: when nothing more is to be expected in this batch.
        """
        self._add(self._owner[site.name], x)
        if self.may_stop and len(self._received) == len(self.shared):
            raise StopForward

    def begin_starved(self, sites: Sequence[Site]) -> None:
        """Empty sums for those experts among `sites` that received nothing where others of their like did."""
        fused = {site.parameter_name for shared in self.shared for site in shared.sites if site.expert is not None}
        for site in sites:
            if site.parameter_name in fused and not self.knows(site):
                self._begin([site])

    def synchronise(self, sites: Sequence[Site], group: ProcessGroup) -> None:
        """Make the inputs the same on all ranks, in the same order; those that this rank has not seen are empty.

        Raises:
            UnsupportedModel: when ranks disagree on which sites share an input.
        """
        by_name = {site.name: site for site in sites}
        groups = {names[0]: names for part in group.all_gather_object(self._groups()) for names in part}
        local = {names[0]: names for names in self._groups()}
        if any(local.get(leader, names) != names for leader, names in groups.items()) or any(
            self.knows(by_name[name]) for leader, names in groups.items() if leader not in local for name in names
        ):
            raise UnsupportedModel(
                "Which sites share an input differs between the windows of two processes: prune in one process."
            )
        for leader, names in groups.items():
            if leader not in local:
                self._begin([by_name[name] for name in names])
        order = list(groups)
        self.shared.sort(key=lambda source: order.index(source.name))

    def _groups(self) -> list[list[str]]:
        return [[site.name for site in one.sites] for one in self.shared]

    def received_once(self, shared: LayerInput) -> bool:
        """Whether an input has been met exactly once since the batch began."""
        return self._received.get(shared.sites[0].name) == 1

    def begin_batch(self, hidden: Tensor) -> None:
        """The next inputs are made of these hidden states (windows, tokens, features)."""
        self._shape = hidden.shape[:2]

    def end_batch(self, complete: bool) -> None:
        """Let go of the inputs of this batch; `complete` when every site is known.

        Once every input has been met exactly once in a batch, later batches may stop at their last input.
        """
        self.may_stop = complete and all(self.received_once(one) for one in self.shared)
        # In later batches a site that is met for the first time may come before others that were met in the first one.
        self._last = None
        self._received.clear()
        self._met.clear()

    def _begin(self, sites: Sequence[Site]) -> LayerInput:
        # Which tokens an expert receives may differ between the dense and the pruned model: it has no drift.
        needs = self.needs if sites[0].expert is None else min(self.needs, Needs.GRAM)
        shared = LayerInput(InputSums.zeros(sites[0].shape[1], needs, self.device), list(sites))
        self.shared.append(shared)
        self._owner |= {site.name: shared for site in sites}
        return shared

    def _add(self, shared: LayerInput, x: Tensor) -> None:
        start = self._now()
        name = shared.sites[0].name
        count = self._received.get(name, 0)
        dense = None if shared.sums.input_shift is None else self._by_window(self._twin(name, count, x))
        shared.sums.update(self._by_window(x), dense)
        self.seconds += self._now() - start
        self._received[name] = count + 1

    def _twin(self, name: str, call: int, x: Tensor) -> Tensor:
        calls = self.dense[name]
        if call >= len(calls) or calls[call].shape != x.shape:
            raise UnsupportedModel(
                f"Site {name} receives other tokens in the pruned model than in the dense one, so that their inputs "
                "cannot be compared: use --dense-target 0."
            )
        return calls[call]

    def _by_window(self, x: Tensor) -> Tensor:
        """The same rows; where a model has laid the tokens of all windows in one row (OPT), window by window again."""
        return x.reshape(*self._shape, x.shape[1]) if x.ndim == 2 and len(x) == self._shape.numel() else x

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def observe(
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    groups: Sequence[Sequence[Site]] = (),
    reference: DenseReference | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Observation:
    """Run `block` over all batches and sum up what its sites receive.

    A batch ends at the last site's input, since nothing after it is wanted: a block that calls its sites once each
    is not run to its end but for the first batch, and that only in the first block of its structure. One that calls a
    site a second time in a later batch or block only, which no decoder is known to do, would have that call overlooked.

    Args:
        block: the block, already on `device`.
        inputs: hidden states and arguments of this block.
        needs: what to collect.
        device: where the forward runs and the sums live.
        groups: the sites to watch, as `discover` grouped them: each group shares one input and is called once in a
            batch. Without it all sites are watched, and who shares what is found out.
        reference: the dense model's activations of the same batches, needed for `Needs.INPUT_SHIFT`.
        group: ranks that observe other windows. All of them get the same inputs in the same order, each with the sums
            of its own windows.

    Raises:
        UnsupportedModel: when a site receives other tokens in the dense model, or shares another input elsewhere.
    """
    wanted = [site for group in groups for site in group] or block.sites
    structure = _structure(block, wanted)
    collector = _Collector(needs, device, groups, len(wanted) if structure in inputs.called_once else None)
    with torch.no_grad():
        for batch in range(len(inputs.hidden)):
            leaders = [shared.sites[0] for shared in collector.shared]
            # In a mixture of experts a site may receive its first tokens in a late batch.
            strangers = [site for site in wanted if not collector.knows(site)]
            if needs >= Needs.INPUT_SHIFT:
                assert reference is not None, "the input shift is measured against the dense model"
                names = {site.name for site in leaders + strangers if site.expert is None}
                collector.dense = (
                    reference.received(names, batch, device, stop_early=collector.may_stop) if names else {}
                )
            hooks = input_hooks(leaders, collector.later), input_hooks(strangers, collector.first)
            collector.begin_batch(inputs.hidden[batch])
            with hooks[0], hooks[1], suppress(StopForward):
                inputs.run(block.index, block.module, batch, device)
            collector.end_batch(complete=all(map(collector.knows, wanted)))
            if not batch and not groups and collector.may_stop:
                inputs.called_once.add(structure)
    collector.begin_starved(wanted)
    collector.synchronise(wanted, group)
    shared = augment_undersampled(collector.shared, block, inputs, needs, device, group)
    return Observation(shared, [site for site in wanted if not collector.knows(site)], collector.seconds)


def _structure(block: Block, sites: Sequence[Site]) -> Structure:
    # What `only` leaves of a block has fewer sites, and is another structure.
    return type(block.module), tuple(site.name.removeprefix(block.name) for site in sites)


def discover(block: Block, inputs: BlockInputs, device: torch.device) -> list[list[Site]]:
    """Which sites share an input, in the order of the forward, as seen in the first batch.

    Sites that receive nothing in that batch, or something more than once, are left out; experts without a token are
    not where others of their like have some, and come last.
    """
    collector = _Collector(Needs.NOTHING, device)
    collector.begin_batch(inputs.hidden[0])
    with torch.no_grad(), input_hooks(block.sites, collector.first):
        inputs.run(block.index, block.module, 0, device)
    met = list(collector.shared)
    collector.begin_starved(block.sites)
    again = {shared.sites[0].parameter_name for shared in met if not collector.received_once(shared)}
    return [shared.sites for shared in collector.shared if shared.sites[0].parameter_name not in again]
