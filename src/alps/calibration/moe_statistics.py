"""Experts that few calibration tokens were routed to: what their statistics are filled up with.

legend  in   inputs of an expert's map                                    scalar
        T_e  tokens that the router sent to the expert                    scalar
        G_e  Gram of what its map received of them                        (in, in)
        T, P the same of the pool                                         scalar, (in, in)
        c    `MIN_TOKENS_PER_INPUT`                                                     scalar
An expert with T_e < c in gets G_e + (c in - T_e) P / T: as many average tokens of the pool as are missing, and the
other sums alike. The rule is continuous at T_e = c in, leaves an expert with enough tokens alone, gives one without any
the pool, and scales with the inputs. The pool of a first map is all tokens that entered the experts; that of a second
map is what the expert's own first map makes of all those tokens, since the features between the two are its own. Where
a module of experts cannot be asked to send tokens elsewhere, it is all that the same map of all experts received.

Where several processes see a part of the tokens each, T_e and T are those of all of them. The rule is linear in the
sums: each process fills up its own part, and the parts add up to what one process would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import StopForward, input_hooks
from alps.calibration.moe_hooks import can_reroute, rerouted
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.statistics import InputStats, InputSums, Needs
from alps.models.blocks import Block
from alps.models.sites import Site

# Tokens for each input: with one the Gram has full rank, and still misleads (docs/experts.md).
MIN_TOKENS_PER_INPUT = 4


@dataclass(frozen=True)
class LayerInput:
    """What was collected of one input, and all the sites that read it (q, k and v; gate and up).

    Attributes:
        sums: over the tokens.
        sites: in the order in which they were met.
        pooled_tokens: average tokens of the pool among those of `sums`; none but for a starving expert.
    """

    sums: InputSums
    sites: list[Site]
    pooled_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that were really received."""
        return self.sums.tokens - self.pooled_tokens

    @property
    def stats(self) -> InputStats:
        """A fresh copy of the sums as solvers read them."""
        return self.sums.to_stats()

    @property
    def name(self) -> str:
        """That of its first site."""
        return self.sites[0].name

    @property
    def notes(self) -> list[str]:
        """What a user should know of it."""
        if not self.pooled_tokens:
            return []
        inputs = self.sites[0].shape[1]
        return [
            f"{self.tokens} tokens were routed here for {inputs} inputs: {self.pooled_tokens} average ones were added"
        ]


def augment_undersampled(
    shared: Sequence[LayerInput],
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[LayerInput]:
    """Add pooled tokens to the statistics of experts that received too few.

    Args:
        shared: inputs of the block's layers, the same on all ranks, each with the sums of this rank's windows.
        block: that holds the experts, on `device`.
        inputs: of the block.
        needs: statistics to collect.
        device: where the block runs.
        group: ranks that see the other windows.

    Returns:
        The same inputs, with this rank's part of the pooled tokens.
    """
    experts = {source.name: source.sums.tokens for source in shared if source.sites[0].expert is not None}
    # Without experts no rank has any, and none need be asked.
    received = group.sum_counters(experts) if experts else experts
    missing = {
        name: max(MIN_TOKENS_PER_INPUT * _inputs_of(name, shared) - count, 0) for name, count in received.items()
    }
    undersampled = [source for source in shared if missing.get(source.name)]
    if not undersampled or needs is Needs.NOTHING:
        return list(shared)
    own = _rerouted_pools([source.sites[0] for source in undersampled], block, inputs, needs, device)
    fused: dict[str, InputSums] = {}
    for source in shared:
        name = source.sites[0].parameter_name
        if source.sites[0].expert is not None and source.sites[0].name not in own:
            fused[name] = fused[name] + source.sums if name in fused else source.sums
    pools = {source.name: own.get(source.name) or fused[source.sites[0].parameter_name] for source in undersampled}
    sizes = group.sum_counters({name: pool.tokens for name, pool in pools.items()})
    return [
        _with_pool(source, pools[source.name], missing[source.name], sizes[source.name], group)
        if source.name in pools
        else source
        for source in shared
    ]


def _inputs_of(name: str, shared: Sequence[LayerInput]) -> int:
    return next(one.sites[0].shape[1] for one in shared if one.name == name)


def _with_pool(source: LayerInput, pool: InputSums, missing: int, of: int, group: ProcessGroup) -> LayerInput:
    added = pool.rescaled(missing, of)
    # The sums of all ranks are added up later, and so are their numbers of tokens.
    tokens = missing if group.is_main else 0
    return replace(source, sums=source.sums + replace(added, tokens=tokens), pooled_tokens=missing)


def _rerouted_pools(
    undersampled: Sequence[Site], block: Block, inputs: BlockInputs, needs: Needs, device: torch.device
) -> dict[str, InputSums]:
    """By name of a site, what it receives when all tokens are sent to its expert; only where that can be done."""
    modules = {id(site.module): site.module for site in undersampled if can_reroute(site.module)}
    pools: dict[str, InputSums] = {}
    for module in modules.values():
        sites = [site for site in undersampled if site.module is module]
        collector = _Everywhere(sites, pools, needs)
        with torch.no_grad(), input_hooks(sites, collector.note), rerouted(module, collector.send_all):
            for batch in range(len(inputs.hidden)):
                with suppress(StopForward):
                    inputs.run(block.index, block.module, batch, device)
    return pools


class _Everywhere:
    """Sends the tokens of every batch to each expert of one module, and sums up what its maps receive."""

    def __init__(self, sites: Sequence[Site], pools: dict[str, InputSums], needs: Needs) -> None:
        self._sites, self._pools, self._needs = sites, pools, min(needs, Needs.GRAM)
        # What a first map receives is the same for all experts, and is summed once.
        self._first: dict[str, InputSums] = {}
        self._summed: set[str] = set()
        self._hidden: Tensor | None = None

    def send_all(self, hidden: Tensor, send: Callable[[int], None]) -> None:
        self._hidden = hidden
        self._summed.clear()
        for expert in sorted({site.expert for site in self._sites if site.expert is not None}):
            send(expert)
        raise StopForward

    def note(self, site: Site, x: Tensor) -> None:
        assert self._hidden is not None
        if x.shape != self._hidden.shape or not torch.equal(x, self._hidden):
            self._pools.setdefault(site.name, self._zeros(x)).update(x)
            return
        name = site.parameter_name
        self._pools[site.name] = self._first.setdefault(name, self._zeros(x))
        if name not in self._summed:
            self._summed.add(name)
            self._first[name].update(x)

    def _zeros(self, x: Tensor) -> InputSums:
        return InputSums.zeros(x.shape[-1], self._needs, x.device)
