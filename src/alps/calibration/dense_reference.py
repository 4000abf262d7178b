"""Activations of the dense model, and hooks on the inputs of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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


class DenseReference:
    """Activations of the dense model beside those of the pruned one, block by block.

    Attributes:
        block: dense copy of the current block, with the same site names; None without inputs.
    """

    def __init__(self, inputs: BlockInputs | None = None) -> None:
        """Start before the first block.

        Args:
            inputs: of the first block, in the same batches as the pruned model's; None for a reference that does
                nothing.
        """
        self.block: Block | None = None
        self._inputs = inputs
        self._advanced = False
        # What sites received, batch by batch and call by call, and outputs of the block, batch by batch.
        self._received: list[dict[str, list[Tensor]]] = []
        self._outputs: list[Tensor] = []

    @classmethod
    def start(cls, inputs: BlockInputs, needed: bool) -> DenseReference:
        """Return a reference that starts at `inputs`, or one that does nothing if it is not needed."""
        return cls(inputs.copy() if needed and inputs.hidden else None)

    def begin_block(self, block: Block) -> None:
        """Copy a block while it is dense; the inputs are those of this block."""
        # The copy before it is freed first.
        self.block, self._advanced = None, False
        if self._inputs is not None:
            self.block = block.clone()

    @property
    def outputs(self) -> list[Tensor]:
        """Outputs of the current block in the dense model, batch by batch; valid after `advance`."""
        assert self._inputs is not None and self._advanced
        return self._inputs.hidden

    def record(self, sites: Sequence[Site], device: torch.device) -> None:
        """Run the block once over all batches and keep what `sites` receive, and the outputs, if memory allows.

        Without it every later call of `received` runs the block.
        """
        if self._inputs is None:
            return
        size = self._inputs.tokens * sum(site.shape[1] * site.dtype.itemsize for site in sites)
        if not select_within_budget([size], self._inputs.activations.limit):
            return
        names = {site.name for site in sites}
        for batch, hidden in enumerate(self._inputs.hidden):
            with torch.no_grad():
                received, output = self._run(names, batch, device, stop_early=False)
            assert output is not None
            self._received.append({name: [x.to(hidden.device) for x in calls] for name, calls in received.items()})
            self._outputs.append(output.to(hidden.device))

    def received(self, names: set[str], batch: int, device: torch.device, stop_early: bool) -> dict[str, list[Tensor]]:
        """Return what the named sites receive in one batch, call by call.

        Args:
            names: of the sites.
            batch: number of the batch.
            device: of the tensors, and where the block is run if nothing was recorded.
            stop_early: end a forward when every site has received something.
        """
        if self._received and names <= self._received[batch].keys():
            return {name: [x.to(device) for x in self._received[batch][name]] for name in names}
        return self._run(names, batch, device, stop_early)[0]

    def advance(self, device: torch.device) -> None:
        """Turn the inputs of the current block into its outputs, once; later calls for the same block do nothing."""
        if self._inputs is None or self._advanced:
            return
        assert self.block is not None
        if self._outputs:
            for batch, output in enumerate(self._outputs):
                self._inputs.replace_batch(batch, output)
        else:
            self._inputs.advance(self.block.index, self.block.module, device)
        self._received, self._outputs, self._advanced = [], [], True

    def _run(
        self, names: set[str], batch: int, device: torch.device, stop_early: bool
    ) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        assert self._inputs is not None and self.block is not None, "the dense model's activations are not followed"
        received: dict[str, list[Tensor]] = {name: [] for name in names}
        output = None

        def note(site: Site, x: Tensor) -> None:
            received[site.name].append(x)
            if stop_early and all(received.values()):
                raise StopForward

        sites = [site for site in self.block.sites if site.name in names]
        with input_hooks(sites, note), suppress(StopForward):
            output = self._inputs.run(self.block.index, self.block.module, batch, device)
        return received, output
