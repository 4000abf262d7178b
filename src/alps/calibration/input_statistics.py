"""Input statistics of a block's sites, collected in one pass; sites that receive the same tensor share them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import add

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
    """Input statistics of one pass over the calibration batches.

    Attributes:
        shared: the distinct inputs, in the order of the forward.
        unused: sites that received nothing.
        seconds: time spent on the sums, a part of the pass.
    """

    shared: list[LayerInput]
    unused: list[Site]
    seconds: float


class _Collector:
    """Callbacks of the input hooks of one pass, and the sums of every distinct input.

    The calls of a site in its first batch show whose input it shares: a site with the same tensors in all its calls. In
    later batches only the first site of each input is watched.
    """

    def __init__(
        self,
        needs: Needs,
        device: torch.device,
        groups: Sequence[Sequence[Site]] = (),
        stop_after: int | None = None,
    ) -> None:
        """Start before the first batch.

        Args:
            needs: statistics to collect.
            device: of the sums.
            groups: sites by their shared input, each called once in a batch; may be empty.
            stop_after: the first batch ends when as many sites have received an input; None runs it to its end.
        """
        self.needs, self.device, self._stop_after = needs, device, stop_after
        self.shared: list[LayerInput] = []
        self._input_by_site: dict[str, LayerInput] = {}
        for group in groups:
            self._add_input(group)
        self.seconds = 0.0
        # Inputs of this batch in the dense model, by the name of the site, call by call; None if it has none.
        self.dense_inputs: dict[str, list[Tensor]] | None = {}
        # Calls in this batch of each input's first site, and of sites without an input.
        self._calls: dict[str, int] = {}
        self.may_stop = bool(groups)  # a batch may end at its last input
        self._batch_shape = torch.Size()  # (windows, tokens)
        # By identity, the tensors of this batch that reached sites without an input, which are kept so that it stays
        # unique, and their sums.
        self._tensors: dict[int, tuple[Tensor, InputSums]] = {}
        # By name, the sites without an input, and the identities of the tensors of their calls.
        self._first_calls: dict[str, tuple[Site, list[int]]] = {}

    def has_seen(self, site: Site) -> bool:
        """Return True if a site has an input."""
        return site.name in self._input_by_site

    def on_first_input(self, site: Site, x: Tensor) -> None:
        """Process the input of a site that had none when the batch began.

        Raises:
            StopForward: when every site has received an input, and none is called again.
        """
        if id(x) not in self._tensors:
            sums = self._make_sums([site])
            self._add_to(sums, site.name, x)
            self._tensors[id(x)] = x, sums
        self._calls[site.name] = self._calls.get(site.name, 0) + 1
        self._first_calls.setdefault(site.name, (site, []))[1].append(id(x))
        if len(self._input_by_site) + len(self._first_calls) == self._stop_after:
            raise StopForward

    def on_input(self, site: Site, x: Tensor) -> None:
        """Process the input of a site that is the first one of its shared input.

        Raises:
            StopForward: when no other input is expected in this batch.
        """
        self._add_to(self._input_by_site[site.name].sums, site.name, x)
        self._calls[site.name] = self._calls.get(site.name, 0) + 1
        if self.may_stop and len(self._calls) == len(self.shared):
            raise StopForward

    def add_unreached_experts(self, sites: Sequence[Site]) -> None:
        """Add empty sums for experts among `sites` without a token if other experts of the same place have tokens."""
        places = {site.place for shared in self.shared for site in shared.sites if site.is_expert}
        for site in sites:
            if site.place in places and not self.has_seen(site):
                self._add_input([site])

    def sync_groups(self, sites: Sequence[Site], group: ProcessGroup) -> None:
        """Make the inputs the same on all ranks, in the same order; inputs that this rank lacks have empty sums.

        Raises:
            UnsupportedModel: when ranks disagree on which sites share an input.
        """
        site_by_name = {site.name: site for site in sites}
        site_names = {names[0]: names for part in group.all_gather_object(self._groups()) for names in part}
        local = {names[0]: names for names in self._groups()}
        if any(local.get(leader, names) != names for leader, names in site_names.items()) or any(
            self.has_seen(site_by_name[name])
            for leader, names in site_names.items()
            if leader not in local
            for name in names
        ):
            raise UnsupportedModel(
                "The calibration windows of two processes disagree on which layers share an input: prune in one "
                "process."
            )
        for leader, names in site_names.items():
            if leader not in local:
                self._add_input([site_by_name[name] for name in names])
        order = list(site_names)
        self.shared.sort(key=lambda source: order.index(source.name))

    def _groups(self) -> list[list[str]]:
        return [[site.name for site in source.sites] for source in self.shared]

    def is_called_once(self, shared: LayerInput) -> bool:
        """Return True if an input has been received exactly once in this batch."""
        return self._calls.get(shared.name) == 1

    def begin_batch(self, windows: int, tokens: int) -> None:
        """Begin a batch of windows of `tokens` tokens."""
        self._batch_shape = torch.Size((windows, tokens))

    def end_batch(self, sites: Sequence[Site]) -> None:
        """Release the tensors of this batch, and decide if later batches may stop at their last input.

        They may if each of the sites has an input, and every input was received exactly once.

        Args:
            sites: all sites.
        """
        self.group_first_calls()
        self.may_stop = all(map(self.has_seen, sites)) and all(map(self.is_called_once, self.shared))
        # In later batches a new site may be called before sites that were seen in the first batch.
        self._stop_after = None
        self._calls.clear()

    def group_first_calls(self) -> None:
        """Turn the first calls of sites into inputs; sites with the same tensors in all their calls share one."""
        groups: dict[tuple[int, ...], list[Site]] = {}
        for site, tensors in self._first_calls.values():
            groups.setdefault(tuple(tensors), []).append(site)
        for identities, group in groups.items():
            sums = [self._tensors[identity][1] for identity in identities]
            self._add_input(group, sums[0] if len(sums) == 1 else reduce(add, sums))
        self._tensors.clear()
        self._first_calls.clear()

    def _add_input(self, sites: Sequence[Site], sums: InputSums | None = None) -> None:
        shared = LayerInput(sums or self._make_sums(sites), list(sites))
        self.shared.append(shared)
        self._input_by_site |= {site.name: shared for site in sites}

    def _make_sums(self, sites: Sequence[Site]) -> InputSums:
        # The routers of the dense and the pruned model may send an expert different tokens: it has no input shift.
        needs = min(self.needs, Needs.GRAM) if sites[0].is_expert else self.needs
        return InputSums.zeros(sites[0].shape[1], needs, self.device)

    def _add_to(self, sums: InputSums, name: str, x: Tensor) -> None:
        """Add the input of the next call of a site to sums."""
        start = self._synchronised_time()
        dense = None if sums.input_shift is None else self._dense_input(name, self._calls.get(name, 0), x)
        sums.update(self._split_windows(x), None if dense is None else self._split_windows(dense))
        self.seconds += self._synchronised_time() - start

    def _dense_input(self, name: str, call: int, x: Tensor) -> Tensor | None:
        """Return the input of the same call in the dense model; None for a batch without dense inputs."""
        if self.dense_inputs is None:
            return None
        calls = self.dense_inputs[name]
        if call >= len(calls) or calls[call].shape != x.shape:
            raise UnsupportedModel(
                f"Layer {name} receives different tokens in the pruned and in the dense model, so their inputs cannot "
                "be compared: use --dense-target 0."
            )
        return calls[call]

    def _split_windows(self, x: Tensor) -> Tensor:
        """Reshape (windows * tokens, features), as in OPT, to (windows, tokens, features); keep all other shapes."""
        is_flat = x.ndim == 2 and len(x) == self._batch_shape.numel()
        return x.reshape(*self._batch_shape, x.shape[1]) if is_flat else x

    def _synchronised_time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def observe(
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    *,
    groups: Sequence[Sequence[Site]] = (),
    reference: DenseReference | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Observation:
    """Run a block over all batches and collect the input statistics of its sites.

    A batch ends at the last site's input, since no later result is needed. If a block calls each site once, only its
    first batch runs to the end, and only in the first block of this structure. A second call of a site that occurs in
    later batches or blocks alone would be missed; no known decoder has one.

    Args:
        block: on `device`.
        inputs: of the block.
        needs: statistics to collect.
        device: where the block runs and the sums are kept.
        groups: the sites to watch by their shared input, as returned by `discover`, each called once in a batch. If
            empty, all sites are watched, and this pass finds out which of them share an input.
        reference: activations of the dense model in the same batches or the first of them, needed for
            `Needs.INPUT_SHIFT`.
        group: ranks that observe other windows. All of them get the same inputs in the same order, each with the sums
            of its own windows.

    Raises:
        UnsupportedModel: when a site receives other tokens in the dense model, or ranks disagree on shared inputs.
    """
    sites = [site for shared_sites in groups for site in shared_sites] or block.sites
    structure = _structure(block, sites)
    collector = _Collector(needs, device, groups, len(sites) if structure in inputs.called_once else None)
    with torch.no_grad():
        for batch in range(len(inputs.hidden)):
            leaders = [shared.sites[0] for shared in collector.shared]
            # In a mixture of experts a site may receive its first tokens in a late batch.
            unseen_sites = [site for site in sites if not collector.has_seen(site)]
            if needs >= Needs.INPUT_SHIFT:
                assert reference is not None, "the input shift needs a dense reference"
                collector.dense_inputs = None
                if batch < reference.batches:
                    names = {site.name for site in leaders + unseen_sites if not site.is_expert}
                    collector.dense_inputs = (
                        reference.collect_inputs(names, batch, device, stop_early=collector.may_stop) if names else {}
                    )
            collector.begin_batch(len(inputs.hidden[batch]), inputs.window_tokens)
            with (
                input_hooks(leaders, collector.on_input),
                input_hooks(unseen_sites, collector.on_first_input),
                suppress(StopForward),
            ):
                inputs.run(block.index, block.module, batch, device)
            collector.end_batch(sites)
            if not batch and not groups and collector.may_stop:
                inputs.called_once.add(structure)
    collector.sync_groups(sites, group)
    collector.add_unreached_experts(sites)
    shared = augment_undersampled(collector.shared, block, inputs, needs, device=device, group=group)
    return Observation(shared, [site for site in sites if not collector.has_seen(site)], collector.seconds)


def _structure(block: Block, sites: Sequence[Site]) -> Structure:
    # A subset of a block's sites, as `only` selects it, is another structure.
    return type(block.module), tuple(site.name.removeprefix(block.name) for site in sites)


def discover(block: Block, inputs: BlockInputs, device: torch.device) -> list[list[Site]]:
    """Group the sites of a block by their shared input in the first batch, in the order of the forward.

    Sites that receive nothing in this batch, or an input more than once, are left out. Experts without a token are
    included, at the end, if other experts of the same place have tokens.

    Args:
        block: on `device`.
        inputs: of the block.
        device: where the block runs.
    """
    collector = _Collector(Needs.NOTHING, device)
    collector.begin_batch(len(inputs.hidden[0]), inputs.window_tokens)
    with torch.no_grad(), input_hooks(block.sites, collector.on_first_input):
        inputs.run(block.index, block.module, 0, device)
    collector.group_first_calls()
    received = list(collector.shared)
    collector.add_unreached_experts(block.sites)
    repeated = {shared.sites[0].parameter_name for shared in received if not collector.is_called_once(shared)}
    return [shared.sites for shared in collector.shared if shared.sites[0].parameter_name not in repeated]
