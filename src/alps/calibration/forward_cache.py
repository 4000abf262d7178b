"""Parts of a block that are pruned already: a pass of sequential order goes on behind them.

Attention ends with the product of its last site, and so does the MLP of most decoders. What that site receives is
observed before it is pruned; once it is, the part's output is one product more, and nothing inside it is computed again
in the passes that follow. Passes from the start of the block take two and a half forwards of it for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs, replaced_forward
from alps.calibration.dense_reference import input_hooks, select_within_budget
from alps.models.blocks import Block
from alps.models.sites import Site


@dataclass(eq=False)
class CachedSubmodule:
    """A module inside a block whose output is that of its last site.

    Attributes:
        module, last, names: itself, that site, and the names of all its sites.
        rest: what it returns after its hidden states, none of it a tensor; None where it returns them alone.
        received: by batch, what the last site receives; gone once its output is there.
        given: by batch, the output, made of pruned weights.
    """

    module: nn.Module
    last: Site
    names: frozenset[str]
    rest: tuple[Any, ...] | None
    received: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)

    def returned(self, hidden: Tensor) -> Any:
        """The hidden states as the module returns them."""
        return hidden if self.rest is None else (hidden, *self.rest)


class CachedForward(BlockInputs):
    """The inputs of a block, run without what is settled in it.

    A batch may be run any number of times, while only the sites that are expected change from pass to pass.
    """

    def __init__(self, block: Block, inputs: BlockInputs, device: torch.device, advances: bool = True) -> None:
        """Of `inputs`, on `device`; unless it `advances`, nothing is kept for a pass after the last site."""
        super().__init__(**vars(inputs))
        self._block, self._device, self._advances = block, device, advances
        self._settled: set[str] = set()
        self._expected: set[str] = set()
        # Parts whose last site receives what the next pass observes, and the site by which it does.
        self._noted: list[tuple[Site, CachedSubmodule]] = []
        self._leaving = False
        # Looked for when a first pass is announced: looking runs the block.
        self.parts: list[CachedSubmodule] | None = None

    def expect(self, groups: Sequence[Sequence[Site]]) -> None:
        """The next pass observes these sites, each group by what its first one receives; those before are pruned."""
        if self.parts is None:
            self.parts = self._affordable()
        self._settled |= self._expected
        self._expected = {site.name for group in groups for site in group}
        known = self._settled | self._expected
        wanted = self.parts if self._advances or any(site.name not in known for site in self._block.sites) else ()
        self._noted = [
            (group[0], part)
            for group in groups
            for part in wanted
            if part.last.name in {site.name for site in group} and part.names <= known
        ]

    def run(self, index: int, block: nn.Module, batch: int, device: torch.device, window: int | None = None) -> Tensor:
        """As `BlockInputs.run`, with the same bits."""
        assert block is self._block.module, "only passes of one block go on where the last one ended"
        if window is not None:
            return super().run(index, block, batch, device, window)
        with ExitStack() as stack:
            for site, part in self._noted:
                stack.enter_context(input_hooks([site], partial(self._note, part, batch), first=True))
            for part in self.parts or ():
                if part.names <= self._settled and (batch in part.received or batch in part.given):
                    stack.enter_context(replaced_forward(part.module, partial(self._resumed, part, batch)))
            return super().run(index, block, batch, device)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """As `BlockInputs.advance`, once; what was kept of a batch is let go."""
        if self.parts is not None:
            self.expect([])
        self._leaving = True
        super().advance(index, block, device)

    def _note(self, part: CachedSubmodule, batch: int, _site: Site, x: Tensor) -> None:
        # A view may hold far more memory than was counted; such a part is computed again each time.
        if x.is_contiguous():
            part.received[batch] = x.to(self.hidden[batch].device)

    def _resumed(self, part: CachedSubmodule, batch: int, *_args: Any, **_kwargs: Any) -> Any:
        if batch in part.given:
            given = part.given.pop(batch) if self._leaving else part.given[batch]
            # A copy, since what follows may write into it.
            return part.returned(given.to(self._device, copy=True))
        hidden = part.last.module(part.received.pop(batch).to(self._device))
        if not self._leaving:
            part.given[batch] = hidden.to(self.hidden[batch].device, copy=True)
        return part.returned(hidden)

    def _affordable(self) -> list[CachedSubmodule]:
        parts = _parts(self._block, self, self._device)
        sizes = [self.tokens * max(part.last.shape) * part.last.dtype.itemsize for part in parts]
        return [parts[index] for index in select_within_budget(sizes, self.activations.limit)]


def _parts(block: Block, inputs: BlockInputs, device: torch.device) -> list[CachedSubmodule]:
    """What one window shows to be parts, and proves: it gives the same without what comes before their last sites."""
    if not block.sites or any(site.expert is not None for site in block.sites):
        return []
    trace = _Trace(block)
    with torch.no_grad():
        with trace.recording():
            whole = inputs.run(block.index, block.module, 0, device, 0)

        def holds(parts: Sequence[CachedSubmodule]) -> bool:
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(replaced_forward(part.module, partial(trace.again, part)))
                return torch.equal(whole, inputs.run(block.index, block.module, 0, device, 0))

        found = trace.parts()
        return found if not found or holds(found) else [part for part in found if holds([part])]


class _Trace:
    """What the sites of a block received in one forward, and what every module inside it returned."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._received: list[tuple[Site, Tensor]] = []
        self._returned: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take note of the forward in the body."""

        def returned(module: nn.Module, _args: Any, output: Any) -> None:
            self._returned.setdefault(module, []).append(output)

        handles = [module.register_forward_hook(returned) for module in self._block.module.modules()]
        try:
            with input_hooks(self._block.sites, lambda site, x: self._received.append((site, x))):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self) -> list[CachedSubmodule]:
        """The outermost modules that end with a site; none where a site is not called exactly once."""
        found = list[CachedSubmodule]()
        if sorted(site.name for site, _ in self._received) != sorted(site.name for site in self._block.sites):
            return found
        for module in self._block.module.modules():
            inside_another = any(module in part.module.modules() for part in found)
            if module is not self._block.module and not inside_another and (part := self._part(module)) is not None:
                found.append(part)
        return found

    def again(self, part: CachedSubmodule, *_args: Any, **_kwargs: Any) -> Any:
        """What a part returns by its last site alone."""
        x = next(x for site, x in self._received if site.name == part.last.name)
        return part.returned(part.last.module(x))

    def _part(self, module: nn.Module) -> CachedSubmodule | None:
        inner = set(module.modules())
        sites = [site for site, _ in self._received if site.module in inner]
        outputs = self._returned.get(module, [])
        if not sites or sites[-1].module is module or len(outputs) != 1:
            return None
        hidden, *more = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
        rest = tuple(more) if isinstance(outputs[0], tuple) else None
        if hidden is not self._returned[sites[-1].module][0] or any(isinstance(one, Tensor) for one in more):
            return None
        return CachedSubmodule(module, sites[-1], frozenset(site.name for site in sites), rest)
