"""Activations of the dense model, and hooks on the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_arguments import to_device
from alps.calibration.block_calls import BlockOutput
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.moe_hooks import matmul_hooks
from alps.models.blocks import Block
from alps.models.sites import Site

# Most bytes of layer inputs or outputs that one model caches for the current block.
MAX_CACHE_BYTES = 2**31


def select_within_budget(sizes: Sequence[int], limit: int | None) -> list[int]:
    """Return the indices of the tensors that are cached for the current block.

    The hidden states between blocks are no part of this budget.

    Args:
        sizes: in bytes, in the order of caching. A tensor that does not fit any more is skipped.
        limit: bytes of activations in memory; None for `MAX_CACHE_BYTES` alone.
    """
    selected, free_bytes = list[int](), MAX_CACHE_BYTES if limit is None else min(MAX_CACHE_BYTES, limit)
    for index, size in enumerate(sizes):
        if size <= free_bytes:
            selected.append(index)
            free_bytes -= size
    return selected


class StopForward(Exception):
    """End of a forward whose remaining results are not needed."""


@contextmanager
def input_hooks(
    sites: Sequence[Site], callback: Callable[[Site, Tensor], None], prepend: bool = False
) -> Iterator[None]:
    """Context in which `callback(site, input)` is called before every forward of a site.

    The slice of an expert has no forward: the callback precedes every product with it.

    Args:
        sites: to watch.
        callback: may raise `StopForward`.
        prepend: call before the hooks that these sites have already.
    """

    def make_hook(site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(site, args[0] if args else next(iter(kwargs.values())))

        return hook

    linears = [site for site in sites if site.expert is None]
    handles = [
        site.module.register_forward_pre_hook(make_hook(site), prepend=prepend, with_kwargs=True) for site in linears
    ]
    try:
        with matmul_hooks([site for site in sites if site.expert is not None], callback):
            yield
    finally:
        for handle in handles:
            handle.remove()


class DenseReference:
    """Activations of the dense model, which advances block by block together with the pruned one.

    Attributes:
        block: dense copy of the current block, with the same site names; None without inputs.
    """

    def __init__(self, inputs: BlockInputs | None = None) -> None:
        """Start before the first block.

        Args:
            inputs: of the first block, in the pruned model's batches or the first of them; None for a reference that
                does nothing.
        """
        self.block: Block | None = None
        self._inputs = inputs
        self._has_advanced = False
        # For each batch, the inputs of the recorded sites, call by call, and the output of the block.
        self._site_inputs: list[dict[str, list[Tensor]]] = []
        self._outputs: list[BlockOutput] = []

    @classmethod
    def start(cls, inputs: BlockInputs, needed: bool, batches: int | None = None) -> DenseReference:
        """Return a reference that starts at the first `batches` of `inputs`, or one that does nothing if not needed."""
        return cls(inputs.first(batches) if needed and inputs.hidden else None)

    @property
    def batches(self) -> int:
        """Number of batches, the first ones of the pruned model's."""
        return 0 if self._inputs is None else len(self._inputs.hidden)

    def begin_block(self, block: Block) -> None:
        """Copy a block while it is dense; the stored hidden states must be its inputs."""
        # The previous copy is freed first.
        self.block, self._has_advanced = None, False
        if self._inputs is not None:
            self.block = block.clone()

    @property
    def outputs(self) -> list[Tensor]:
        """Outputs of the current block in the dense model, batch by batch; valid after `advance`."""
        assert self._inputs is not None and self._has_advanced
        return self._inputs.hidden

    def record(self, sites: Sequence[Site], device: torch.device) -> None:
        """Run the block over all batches and cache the inputs of `sites` and the outputs, if memory allows.

        Without this cache every call of `collect_inputs` runs the block.
        """
        if self._inputs is None:
            return
        size = self._inputs.tokens * sum(site.shape[1] * site.dtype.itemsize for site in sites)
        if not select_within_budget([size], self._inputs.activations.limit):
            return
        names = {site.name for site in sites}
        for batch, hidden in enumerate(self._inputs.hidden):
            with torch.no_grad():
                inputs, output = self._run(names, batch, device, stop_early=False)
            assert output is not None
            self._site_inputs.append({name: [x.to(hidden.device) for x in calls] for name, calls in inputs.items()})
            self._outputs.append(
                BlockOutput(output.hidden.to(hidden.device), to_device(output.handed_on, hidden.device))
            )

    def collect_inputs(
        self, names: set[str], batch: int, device: torch.device, *, stop_early: bool
    ) -> dict[str, list[Tensor]]:
        """Return the inputs of sites in one batch by the name of the site, call by call.

        Args:
            names: of the sites.
            batch: number of the batch.
            device: of the tensors, and where the block is run if nothing was recorded.
            stop_early: end a forward as soon as every site has received an input.
        """
        if self._site_inputs and names <= self._site_inputs[batch].keys():
            return {name: [x.to(device) for x in self._site_inputs[batch][name]] for name in names}
        return self._run(names, batch, device, stop_early)[0]

    def run_block(self, batch: int, device: torch.device) -> None:
        """Run the dense copy of the current block on a batch of dense inputs, for hooks on its modules."""
        assert self._inputs is not None and self.block is not None, "the dense reference has no inputs"
        self._inputs.run(self.block.index, self.block.module, batch, device)

    def advance(self, device: torch.device) -> None:
        """Turn the inputs of the current block into its outputs, once; later calls for the same block do nothing."""
        if self._inputs is None or self._has_advanced:
            return
        assert self.block is not None
        if self._outputs:
            for batch, output in enumerate(self._outputs):
                self._inputs.replace_batch(batch, output)
        else:
            self._inputs.advance(self.block.index, self.block.module, device)
        self._site_inputs, self._outputs, self._has_advanced = [], [], True

    def _run(
        self, names: set[str], batch: int, device: torch.device, stop_early: bool
    ) -> tuple[dict[str, list[Tensor]], BlockOutput | None]:
        """Run the block on one batch; return the inputs of sites, and the output, or None if the run was stopped."""
        assert self._inputs is not None and self.block is not None, "the dense reference has no inputs"
        site_inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        output = None

        def on_input(site: Site, x: Tensor) -> None:
            site_inputs[site.name].append(x)
            if stop_early and all(site_inputs.values()):
                raise StopForward

        sites = [site for site in self.block.sites if site.name in names]
        with input_hooks(sites, on_input), suppress(StopForward):
            output = self._inputs.forward(self.block.index, self.block.module, batch, device)
        return site_inputs, output
