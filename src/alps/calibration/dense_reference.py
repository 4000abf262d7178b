"""The dense model walking beside the pruned one, and hooks that watch what sites receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.moe_hooks import matmul_hooks
from alps.models.blocks import Block
from alps.models.sites import Site

# What sites received, of either model, is kept until their block is done while it takes no more than this.
KEEP_BYTES = 2**31


def select_within_budget(sizes: Sequence[int], limit: int | None) -> list[int]:
    """Indices of what one stream keeps of the block that is being pruned, besides the hidden states between blocks.

    Args:
        sizes: in bytes, in the order in which they are kept while there is room; what is too large is left out.
        limit: of activations in memory, None for no other than `KEEP_BYTES`.
    """
    found, room = list[int](), KEEP_BYTES if limit is None else min(KEEP_BYTES, limit)
    for index, size in enumerate(sizes):
        if size <= room:
            found.append(index)
            room -= size
    return found


class StopForward(Exception):
    """Nothing that the rest of a block's forward computes is wanted."""


@contextmanager
def input_hooks(sites: Sequence[Site], callback: Callable[[Site, Tensor], None], first: bool = False) -> Iterator[None]:
    """Call `callback(site, input)` before every forward of a site for the time of the body.

    An expert's slice has no forward: it is called back before every product with it. With `first` the call comes before
    those of others that watch the same site already.
    """

    def hook(site: Site) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(site, args[0] if args else next(iter(kwargs.values())))

        return before

    alone = [site for site in sites if site.expert is None]
    handles = [site.module.register_forward_pre_hook(hook(site), prepend=first, with_kwargs=True) for site in alone]
    try:
        with matmul_hooks([site for site in sites if site.expert is not None], callback):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class DenseReference:
    """The dense side of one block: a dense copy of it, and what it receives in the dense model.

    Attributes:
        block: dense twin of the observed block, with the same site names.
        inputs: its hidden states and arguments, in the same batches as the pruned model's.
    """

    block: Block
    inputs: BlockInputs
    _kept: list[dict[str, list[Tensor]]] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)

    def record(self, sites: Sequence[Site], device: torch.device) -> None:
        """Run the block once over all batches and keep what `sites` receive, and the outputs, if memory allows.

        Without it every later question takes a pass of its own.
        """
        size = self.inputs.tokens * sum(site.shape[1] * site.dtype.itemsize for site in sites)
        if not select_within_budget([size], self.inputs.activations.limit):
            return
        names = {site.name for site in sites}
        for batch, hidden in enumerate(self.inputs.hidden):
            with torch.no_grad():
                found, output = self._pass(names, batch, device, once=False)
            assert output is not None
            self._kept.append({name: [x.to(hidden.device) for x in calls] for name, calls in found.items()})
            self._outputs.append(output.to(hidden.device))

    def received(self, names: set[str], batch: int, device: torch.device, once: bool) -> dict[str, list[Tensor]]:
        """What the named sites receive in one batch, call by call; with `once` a pass ends at the last of them."""
        if self._kept and names <= self._kept[batch].keys():
            return {name: [x.to(device) for x in self._kept[batch][name]] for name in names}
        return self._pass(names, batch, device, once)[0]

    def advance(self, device: torch.device) -> None:
        """Turn the inputs into those of the next block; what was kept is let go."""
        if self._outputs:
            for batch, output in enumerate(self._outputs):
                self.inputs.put(batch, output)
        else:
            self.inputs.advance(self.block.index, self.block.module, device)
        self._kept, self._outputs = [], []

    def _pass(
        self, names: set[str], batch: int, device: torch.device, once: bool
    ) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        output = None

        def note(site: Site, x: Tensor) -> None:
            found[site.name].append(x)
            if once and all(found.values()):
                raise StopForward

        sites = [site for site in self.block.sites if site.name in names]
        with input_hooks(sites, note), suppress(StopForward):
            output = self.inputs.run(self.block.index, self.block.module, batch, device)
        return found, output
