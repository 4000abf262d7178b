"""Collect the input statistics of a block's sites; sites fed by the same tensor share one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.capture import BlockInputs
from alps.models.sites import Site
from alps.stats import InputStats, Needs


@dataclass(frozen=True)
class SharedInput:
    """The statistics of one input and all the sites that read it (q, k and v; gate and up)."""

    stats: InputStats
    sites: list[Site]


@dataclass
class Observation:
    """What one pass over the calibration batches saw.

    Attributes:
        shared: the distinct inputs, in the order in which they appear in the forward.
        unused: sites that received nothing.
        seconds: time spent summing statistics, a part of the pass.
    """

    shared: list[SharedInput]
    unused: list[Site]
    seconds: float


class _AllSeen(Exception):
    """Nothing that the rest of a block's forward computes is wanted."""


class _Collector:
    """Hooks for one pass: a site's first batch finds out whose input it shares, later ones watch one site per input."""

    def __init__(self, needs: Needs, device: torch.device) -> None:
        self.needs, self.device = needs, device
        self.shared: list[SharedInput] = []
        self.seconds = 0.0
        # How often each input's first site has received something in this batch.
        self._received: dict[str, int] = {}
        self._may_stop = False
        # Inputs of this batch that met a new site; held, so that identity means the same tensor.
        self._met: list[tuple[Tensor, SharedInput]] = []

    @property
    def known(self) -> set[str]:
        """Names of the sites that have received something."""
        return {site.name for shared in self.shared for site in shared.sites}

    def first(self, site: Site, x: Tensor) -> None:
        """A site that was not known when the batch began receives `x`."""
        for tensor, shared in self._met:
            if tensor is x and site not in shared.sites:
                shared.sites.append(site)
                return
        owner = next((shared for shared in self.shared if site in shared.sites), None)
        if owner is None:
            owner = SharedInput(InputStats.zeros(site.shape[1], self.needs, self.device), [site])
            self.shared.append(owner)
        self._met.append((x, owner))
        self._add(owner, x)

    def later(self, site: Site, x: Tensor) -> None:
        """The first site of a known input receives `x`.

        Raises:
            _AllSeen: when nothing more is to be expected in this batch.
        """
        self._add(next(shared for shared in self.shared if shared.sites[0] is site), x)
        if self._may_stop and len(self._received) == len(self.shared):
            raise _AllSeen

    def end_batch(self, complete: bool) -> None:
        """Let go of the inputs of this batch; `complete` when every site is known.

        Once every input has been met exactly once in a batch, later batches may stop at their last input.
        """
        self._may_stop = complete and all(self._received.get(one.sites[0].name) == 1 for one in self.shared)
        self._received.clear()
        self._met.clear()

    def _add(self, shared: SharedInput, x: Tensor) -> None:
        start = self._now()
        shared.stats.update(x)
        self.seconds += self._now() - start
        name = shared.sites[0].name
        self._received[name] = self._received.get(name, 0) + 1

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def observe(block: Block, inputs: BlockInputs, needs: Needs, device: torch.device) -> Observation:
    """Run `block` over all batches and sum up what its sites receive.

    A batch ends at the last site's input, since nothing after it is wanted: a block that calls its sites once each
    is not run to its end but for the first batch. A block that then calls a site a second time in a later batch only,
    which no decoder is known to do, would have that call overlooked.

    Args:
        block: the block, already on `device`.
        inputs: hidden states and arguments of this block.
        needs: what to collect.
        device: where the forward runs and the sums live.
    """
    collector = _Collector(needs, device)
    with torch.no_grad():
        for batch in range(len(inputs.hidden)):
            leaders = [shared.sites[0] for shared in collector.shared]
            # In a mixture of experts a site may receive its first tokens in a late batch.
            strangers = [site for site in block.sites if site.name not in collector.known]
            watching = _watching(leaders, collector.later), _watching(strangers, collector.first)
            with watching[0], watching[1], suppress(_AllSeen):
                inputs.run(block.index, block.module, batch, device)
            collector.end_batch(complete=all(site.name in collector.known for site in block.sites))
    unused = [site for site in block.sites if site.name not in collector.known]
    return Observation(collector.shared, unused, collector.seconds)


@contextmanager
def _watching(sites: Sequence[Site], callback: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `callback(site, input)` before every forward of a site for the time of the body."""

    def hook(site: Site) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(site, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = [site.module.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
