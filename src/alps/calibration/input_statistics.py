"""Input statistics of a block's sites, collected in one pass; sites that receive the same tensor share them."""

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

    The first call of a site shows whose input it shares. In later batches only the first site of each input is watched.
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
        # Inputs of this batch in the dense model, by the name of the site, call by call.
        self.dense_inputs: dict[str, list[Tensor]] = {}
        # Calls of each input's first site in this batch.
        self._calls: dict[str, int] = {}
        self.may_stop = bool(groups)  # a batch may end at its last input
        self._batch_shape = torch.Size()  # (windows, tokens)
        # Tensors of this batch that reached a site for the first time. A tensor that is kept has a unique identity.
        self._seen_inputs: list[tuple[Tensor, LayerInput]] = []

    def has_seen(self, site: Site) -> bool:
        """Return True if a site has an input."""
        return site.name in self._input_by_site

    def on_first_input(self, site: Site, x: Tensor) -> None:
        """Process the input of a site that had none when the batch began.

        Raises:
            StopForward: when every site has received an input, and none is called again.
        """
        self._assign_input(site, x)
        if len(self._input_by_site) == self._stop_after:
            raise StopForward

    def on_input(self, site: Site, x: Tensor) -> None:
        """Process the input of a site that is the first one of its shared input.

        Raises:
            StopForward: when no other input is expected in this batch.
        """
        self._update_sums(self._input_by_site[site.name], x)
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
        """Begin a batch of as many windows of `tokens` tokens."""
        self._batch_shape = torch.Size((windows, tokens))

    def end_batch(self, complete: bool) -> None:
        """Release the tensors of this batch, and decide if later batches may stop at their last input.

        They may if every input was received exactly once.

        Args:
            complete: every site has an input.
        """
        self.may_stop = complete and all(self.is_called_once(source) for source in self.shared)
        # In later batches a new site may be called before sites that were seen in the first batch.
        self._stop_after = None
        self._calls.clear()
        self._seen_inputs.clear()

    def _assign_input(self, site: Site, x: Tensor) -> None:
        """Add `x` to the sums of a site, unless it is the input of another site, which is then shared."""
        source = self._input_by_site.get(site.name)
        if source is None:
            for tensor, shared in self._seen_inputs:
                if tensor is x:
                    shared.sites.append(site)
                    self._input_by_site[site.name] = shared
                    return
            source = self._add_input([site])
        self._seen_inputs.append((x, source))
        self._update_sums(source, x)

    def _add_input(self, sites: Sequence[Site]) -> LayerInput:
        # The routers of the dense and the pruned model may send an expert different tokens: it has no input shift.
        needs = min(self.needs, Needs.GRAM) if sites[0].is_expert else self.needs
        shared = LayerInput(InputSums.zeros(sites[0].shape[1], needs, self.device), list(sites))
        self.shared.append(shared)
        self._input_by_site |= {site.name: shared for site in sites}
        return shared

    def _update_sums(self, shared: LayerInput, x: Tensor) -> None:
        start = self._synchronised_time()
        name = shared.name
        call = self._calls.get(name, 0)
        dense = None if shared.sums.input_shift is None else self._split_windows(self._dense_input(name, call, x))
        shared.sums.update(self._split_windows(x), dense)
        self.seconds += self._synchronised_time() - start
        self._calls[name] = call + 1

    def _dense_input(self, name: str, call: int, x: Tensor) -> Tensor:
        """Return the input of the same call in the dense model."""
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
        reference: activations of the dense model in the same batches, needed for `Needs.INPUT_SHIFT`.
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
            collector.end_batch(complete=all(map(collector.has_seen, sites)))
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
    received = list(collector.shared)
    collector.add_unreached_experts(block.sites)
    repeated = {shared.sites[0].parameter_name for shared in received if not collector.is_called_once(shared)}
    return [shared.sites for shared in collector.shared if shared.sites[0].parameter_name not in repeated]
