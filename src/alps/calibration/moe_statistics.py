"""Augmentation of the input statistics of MoE experts that received too few calibration tokens.

legend  in   inputs of an expert's layer                                  scalar
        T_e  tokens that the router sent to the expert                    scalar
        G_e  Gram of the layer's inputs for these tokens                  (in, in)
        T, P number of tokens and Gram of the pool                        scalar, (in, in)
        c    `MIN_TOKENS_PER_INPUT`                                       scalar
An expert with T_e < c in gets G_e + (c in - T_e) P / T, that is, the missing number of average tokens of the pool. The
sums and the sums of squares follow the same rule. It is continuous at T_e = c in, does not change an expert with enough
tokens, uses the pool alone for an expert without tokens, and scales with the inputs.

Pool of a first projection (gate and up): all tokens that enter the MoE layer. Pool of a second projection (down): all
these tokens, passed through the expert's own first projection, since its features are its own. If the module cannot be
re-routed, the pool is the input of this projection over all experts.

If several ranks see a part of the tokens each, T_e and T count the tokens of all ranks. The rule is linear in the sums,
so each rank augments its own part, and the parts add up to the result of a single process.
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

# One token for each input gives the Gram full rank, but a misleading one (docs/explanation/experts.md).
MIN_TOKENS_PER_INPUT = 4


@dataclass(frozen=True)
class LayerInput:
    """Input statistics, and all the sites that read this input (q, k and v; gate and up).

    Attributes:
        sums: over the tokens.
        sites: in the order in which the forward reaches them.
        pooled_tokens: number of average tokens of the pool in `sums`; 0 unless the site is an undersampled expert.
    """

    sums: InputSums
    sites: list[Site]
    pooled_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Number of received tokens, without those of the pool."""
        return self.sums.tokens - self.pooled_tokens

    @property
    def stats(self) -> InputStats:
        """A new copy of the sums in the form that solvers read."""
        return self.sums.to_stats()

    @property
    def name(self) -> str:
        """Name of the first site."""
        return self.sites[0].name

    @property
    def notes(self) -> list[str]:
        """Notes for the user on how the statistics were made."""
        if not self.pooled_tokens:
            return []
        inputs = self.sites[0].shape[1]
        return [
            f"{self.tokens} tokens were routed to this expert for {inputs} inputs: "
            f"{self.pooled_tokens} average tokens were added"
        ]


def augment_undersampled(
    shared: Sequence[LayerInput],
    block: Block,
    inputs: BlockInputs,
    needs: Needs,
    *,
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
    experts = {source.name: source for source in shared if source.sites[0].is_expert}
    # All ranks have the same inputs: without experts none of them takes part in the reduction.
    tokens = {name: source.sums.tokens for name, source in experts.items()}
    total_tokens = group.sum_counters(tokens) if tokens else tokens
    missing = {
        name: max(MIN_TOKENS_PER_INPUT * experts[name].sites[0].shape[1] - count, 0)
        for name, count in total_tokens.items()
    }
    undersampled = [source for source in shared if missing.get(source.name)]
    if not undersampled or needs is Needs.NOTHING:
        return list(shared)
    rerouted_pools = _collect_rerouted([source.sites[0] for source in undersampled], block, inputs, needs, device)
    place_pools: dict[str, InputSums] = {}
    for name, source in experts.items():
        if name not in rerouted_pools:
            for place in {site.place for site in source.sites}:
                pool = place_pools.get(place)
                place_pools[place] = source.sums if pool is None else pool + source.sums
    pools = {
        source.name: rerouted_pools.get(source.name) or place_pools[source.sites[0].place] for source in undersampled
    }
    pool_tokens = group.sum_counters({name: pool.tokens for name, pool in pools.items()})

    def augment(source: LayerInput) -> LayerInput:
        name = source.name
        if name not in pools:
            return source
        # The token counts of all ranks are added up later, like their sums: only one rank may count the missing tokens.
        added = replace(
            pools[name].rescaled(missing[name], pool_tokens[name]), tokens=missing[name] if group.is_main else 0
        )
        return replace(source, sums=source.sums + added, pooled_tokens=missing[name])

    return [augment(source) for source in shared]


def _collect_rerouted(
    undersampled: Sequence[Site], block: Block, inputs: BlockInputs, needs: Needs, device: torch.device
) -> dict[str, InputSums]:
    """Return, by the name of a site, its sums if all tokens go to its expert; without modules that do not re-route."""
    modules = {id(site.module): site.module for site in undersampled if can_reroute(site.module)}
    pools: dict[str, InputSums] = {}
    for module in modules.values():
        sites = [site for site in undersampled if site.module is module]
        collector = _AllTokensCollector(sites, pools, needs)
        with torch.no_grad(), input_hooks(sites, collector.on_input), rerouted(module, collector.send_all):
            for batch in range(len(inputs.hidden)):
                with suppress(StopForward):
                    inputs.run(block.index, block.module, batch, device)
    return pools


class _AllTokensCollector:
    """Collector that sends the tokens of every batch to each expert of one module, and sums their layers' inputs."""

    def __init__(self, sites: Sequence[Site], pools: dict[str, InputSums], needs: Needs) -> None:
        self._sites, self._pools, self._needs = sites, pools, min(needs, Needs.GRAM)
        # By the name of the parameter. The input of a first projection is the same for all experts, and is summed once.
        self._module_inputs: dict[str, InputSums] = {}
        self._summed: set[str] = set()
        self._hidden: Tensor | None = None

    def send_all(self, hidden: Tensor, send: Callable[[int], None]) -> None:
        """Send the hidden states (tokens, features) to each expert, then end the forward."""
        self._hidden = hidden
        self._summed.clear()
        for expert in sorted({site.expert for site in self._sites if site.expert is not None}):
            send(expert)
        raise StopForward

    def on_input(self, site: Site, x: Tensor) -> None:
        """Add the input of a site (tokens, features) to its pool."""
        assert self._hidden is not None
        if x.shape != self._hidden.shape or not torch.equal(x, self._hidden):
            self._pools.setdefault(site.name, self._make_zeros(x)).update(x)
            return
        name = site.parameter_name
        self._pools[site.name] = self._module_inputs.setdefault(name, self._make_zeros(x))
        if name not in self._summed:
            self._summed.add(name)
            self._module_inputs[name].update(x)

    def _make_zeros(self, x: Tensor) -> InputSums:
        return InputSums.zeros(x.shape[-1], self._needs, x.device)
