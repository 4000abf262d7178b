"""Forward cache for true-sequential pruning: reuse of the outputs of submodules that are already pruned.

Attention ends with the product of its last site, and so does the MLP of most decoders. The input of that site is
observed before the site is pruned. Once it is pruned, the output of the submodule is one more product, and later passes
compute nothing inside the submodule again. Without the cache, passes cost two and a half times as many forwards of a
block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_arguments import leaves
from alps.calibration.block_calls import BlockOutput
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import input_hooks, select_within_budget
from alps.calibration.replaced_forward import replaced_forward
from alps.models.blocks import Block
from alps.models.sites import Site


@dataclass(eq=False)
class CachedSubmodule:
    """Module inside a block whose output is that of its last site.

    Attributes:
        module, last, names: the module, its last site, and the names of all its sites.
        extra_outputs: returned after the hidden states, no tensor among them; None if the hidden states are returned
            as a tensor.
        inputs: by batch, of the last site; freed once the output is there.
        outputs: by batch, computed with pruned weights.
    """

    module: nn.Module
    last: Site
    names: frozenset[str]
    extra_outputs: tuple[Any, ...] | None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def as_output(self, hidden: Tensor) -> Any:
        """Convert hidden states to the return value of the module."""
        return hidden if self.extra_outputs is None else (hidden, *self.extra_outputs)


class CachedForward(BlockInputs):
    """Inputs of a block that are run without the submodules whose sites are all pruned.

    A batch may be run any number of times, as long as only the sites of the current pass change between passes.
    """

    def __init__(self, block: Block, inputs: BlockInputs, device: torch.device, advances: bool = True) -> None:
        """Wrap the inputs of a block; the lists of `inputs` are shared, not copied.

        Args:
            block: on `device`.
            inputs: of the block.
            device: where the block runs.
            advances: `advance` will be called after the last pass. If not, nothing is cached for a pass after the last
                site.
        """
        super().__init__(**vars(inputs))
        self._block, self._device, self._advances = block, device, advances
        self._pruned: set[str] = set()
        self._current: set[str] = set()
        # Submodules whose last site receives what the next pass observes, each with the observed site.
        self._to_cache: list[tuple[Site, CachedSubmodule]] = []
        self._is_last_pass = False
        # Set at the first pass, because the search runs the block.
        self.submodules: list[CachedSubmodule] | None = None

    def begin_pass(self, groups: Sequence[Sequence[Site]]) -> None:
        """Announce the next pass; the sites of earlier passes are pruned by now.

        Args:
            groups: sites that the pass observes, those with a common input in one group. The input of a group is that
                of its first site.
        """
        if self.submodules is None:
            self.submodules = self._find_affordable()
        self._pruned |= self._current
        self._current = {site.name for group in groups for site in group}
        done = self._pruned | self._current
        needs_cache = self._advances or any(site.name not in done for site in self._block.sites)
        self._to_cache = [
            (group[0], submodule)
            for group in groups
            for submodule in (self.submodules if needs_cache else ())
            if submodule.last.name in {site.name for site in group} and submodule.names <= done
        ]

    def forward(
        self, index: int, block: nn.Module, batch: int, device: torch.device, *, window: int | None = None
    ) -> BlockOutput:
        """Run the block like `BlockInputs.forward`, with bit-identical outputs."""
        assert block is self._block.module, "the cache is that of one block"
        if window is not None:
            return super().forward(index, block, batch, device, window=window)
        with ExitStack() as stack:
            for site, submodule in self._to_cache:
                stack.enter_context(input_hooks([site], partial(self._cache_input, submodule, batch), prepend=True))
            for submodule in self.submodules or ():
                is_cached = batch in submodule.inputs or batch in submodule.outputs
                if submodule.names <= self._pruned and is_cached:
                    forward = partial(self._cached_forward, submodule, batch)
                    stack.enter_context(replaced_forward(submodule.module, forward))
            return super().forward(index, block, batch, device)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Replace the inputs by the outputs like `BlockInputs.advance`, once; the cache of each batch is freed."""
        if self.submodules is not None:
            self.begin_pass([])
        self._is_last_pass = True
        super().advance(index, block, device)

    def _cache_input(self, submodule: CachedSubmodule, batch: int, _site: Site, x: Tensor) -> None:
        # A view may hold far more memory than the budget counts; its submodule is computed again in every pass.
        if x.is_contiguous():
            submodule.inputs[batch] = x.to(self.hidden[batch].device)

    def _cached_forward(self, submodule: CachedSubmodule, batch: int, *_args: Any, **_kwargs: Any) -> Any:
        if batch in submodule.outputs:
            output = submodule.outputs.pop(batch) if self._is_last_pass else submodule.outputs[batch]
            # Copied, since the rest of the block may write into it.
            return submodule.as_output(output.to(self._device, copy=True))
        hidden = submodule.last.module(submodule.inputs.pop(batch).to(self._device))
        if not self._is_last_pass:
            submodule.outputs[batch] = hidden.to(self.hidden[batch].device, copy=True)
        return submodule.as_output(hidden)

    def _find_affordable(self) -> list[CachedSubmodule]:
        submodules = _find_submodules(self._block, self, self._device)
        sizes = [self.tokens * max(sub.last.shape) * sub.last.dtype.itemsize for sub in submodules]
        return [submodules[index] for index in select_within_budget(sizes, self.activations.limit)]


def _find_submodules(block: Block, inputs: BlockInputs, device: torch.device) -> list[CachedSubmodule]:
    """Find the submodules of a block that can be cached, by running one window.

    A submodule qualifies if the block gives bit-identical outputs when only the submodule's last site is computed, and
    hands bit-identical values to later blocks.
    """
    if not block.sites or any(site.expert is not None for site in block.sites):
        return []
    trace = _Trace(block)
    with torch.no_grad():
        with trace.recording():
            expected = inputs.forward(block.index, block.module, 0, device, window=0)

        def is_exact(submodules: Sequence[CachedSubmodule]) -> bool:
            with ExitStack() as stack:
                for submodule in submodules:
                    stack.enter_context(replaced_forward(submodule.module, partial(trace.replay, submodule)))
                try:
                    output = inputs.forward(block.index, block.module, 0, device, window=0)
                except KeyError:  # of a container that the submodule fills
                    return False
                return _is_equal(output, expected)

        candidates = trace.submodules()
        if not candidates or is_exact(candidates):
            return candidates
        return [submodule for submodule in candidates if is_exact([submodule])]


def _is_equal(output: BlockOutput, other: BlockOutput) -> bool:
    trees = [list(leaves((part.hidden, part.handed_on))) for part in (output, other)]
    return len(trees[0]) == len(trees[1]) and all(
        torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b for a, b in zip(*trees, strict=True)
    )


class _Trace:
    """Inputs of a block's sites in one forward, and outputs of all modules inside the block."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._inputs: list[tuple[Site, Tensor]] = []
        self._outputs: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context that records a forward of the block."""

        def record_output(module: nn.Module, _args: Any, output: Any) -> None:
            self._outputs.setdefault(module, []).append(output)

        handles = [module.register_forward_hook(record_output) for module in self._block.module.modules()]
        try:
            with input_hooks(self._block.sites, lambda site, x: self._inputs.append((site, x))):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def submodules(self) -> list[CachedSubmodule]:
        """List the outermost modules that end with a site; none if a site is not called exactly once."""
        submodules = list[CachedSubmodule]()
        if sorted(site.name for site, _ in self._inputs) != sorted(site.name for site in self._block.sites):
            return submodules
        for module in self._block.module.modules():
            is_inside = any(module in submodule.module.modules() for submodule in submodules)
            if module is self._block.module or is_inside:
                continue
            if (submodule := self._as_submodule(module)) is not None:
                submodules.append(submodule)
        return submodules

    def replay(self, submodule: CachedSubmodule, *_args: Any, **_kwargs: Any) -> Any:
        """Compute the output of a submodule by its last site alone."""
        x = next(x for site, x in self._inputs if site.name == submodule.last.name)
        return submodule.as_output(submodule.last.module(x))

    def _as_submodule(self, module: nn.Module) -> CachedSubmodule | None:
        """Return the cache for a module; None if its output is not that of its last site."""
        inner = set(module.modules())
        sites = [site for site, _ in self._inputs if site.module in inner]
        outputs = self._outputs.get(module, [])
        if not sites or sites[-1].module is module or len(outputs) != 1:
            return None
        hidden, *extra = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
        extra_outputs = tuple(extra) if isinstance(outputs[0], tuple) else None
        if hidden is not self._outputs[sites[-1].module][0] or any(isinstance(value, Tensor) for value in extra):
            return None
        return CachedSubmodule(module, sites[-1], frozenset(site.name for site in sites), extra_outputs)
