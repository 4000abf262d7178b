"""The walk: blocks in order, each pruned on what the already pruned ones before it produce.

For every block: one pass over the calibration batches collects the inputs of its sites, the sites are solved and
written back, a second pass turns the batches into the inputs of the next block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alps.errors import ConfigError, SolveFailed
from alps.models.blocks import Block
from alps.models.capture import BlockInputs, capture
from alps.models.observe import SharedInput, observe
from alps.models.sites import Site
from alps.progress import Silent, Watcher
from alps.report import LayerRecord, solve_record
from alps.runtime import exact_float32
from alps.solvers.base import Method, Solution
from alps.solvers.objective import relative_errors
from alps.solvers.pattern import Pattern, keep_largest
from alps.solvers.selection import masked
from alps.stats import InputStats, Needs

# Calibration tokens per forward of a block.
_BATCH_TOKENS = 4096


@dataclass
class Walk:
    """One pruning of one model.

    Attributes:
        method, pattern: what to do to every site.
        device: where a block is run and solved; it is brought there and back.
        offload: keep the activations between blocks on the CPU.
        measure_errors: collect the Gram for every method, so that its error and magnitude's can be told.
        watcher: told after every site.
        records: one for every site, in the order in which they were solved.
        seconds: wall time by phase.
    """

    method: Method
    pattern: Pattern
    device: torch.device
    offload: bool = False
    measure_errors: bool = True
    watcher: Watcher = field(default_factory=Silent)
    records: list[LayerRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What is collected of every input."""
        return Needs.GRAM if self.measure_errors else self.method.needs

    def run(self, model: nn.Module, blocks: list[Block], windows: Tensor | None) -> None:
        """Prune every site of `blocks` in place.

        Args:
            model: the model the blocks belong to, in evaluation mode.
            blocks: its decoder blocks in order.
            windows: calibration token ids (windows, tokens); None only when nothing is collected.

        Raises:
            ConfigError: when the pattern does not fit a site.
            SolveFailed: when activations or answers are not finite; names the block or site.
        """
        check_fit(blocks, self.pattern)
        self.watcher.start(f"{self.method.name} {self.pattern}", sum(len(block.sites) for block in blocks))
        try:
            with exact_float32():
                if self.needs is Needs.NOTHING:
                    self._without_inputs(blocks)
                else:
                    assert windows is not None
                    self._with_inputs(model, blocks, windows)
        finally:
            self.watcher.finish()

    def _without_inputs(self, blocks: list[Block]) -> None:
        for block in blocks:
            with self._on_device(block):
                for site in block.sites:
                    empty = InputStats.zeros(site.shape[1], Needs.NOTHING, self.device)
                    self._solve_shared(block, SharedInput(empty, [site]))

    def _with_inputs(self, model: nn.Module, blocks: list[Block], windows: Tensor) -> None:
        with self._timed("capture"):
            inputs = capture(model, blocks, windows, max(_BATCH_TOKENS // windows.shape[1], 1))
            storage = torch.device("cpu") if self.offload else self.device
            inputs.hidden = [hidden.to(storage) for hidden in inputs.hidden]
        for block in blocks:
            with self._on_device(block):
                self._prune_block(block, inputs)
                if block is not blocks[-1]:
                    with self._timed("forward"), torch.no_grad():
                        for batch in range(len(inputs.hidden)):
                            output = inputs.run(block.index, block.module, batch, self.device)
                            inputs.hidden[batch] = output.to(inputs.hidden[batch].device)

    def _prune_block(self, block: Block, inputs: BlockInputs) -> None:
        with self._timed("forward"):
            seen = observe(block, inputs, self.needs, self.device)
        self.seconds["forward"] -= seen.seconds
        self.seconds["gram"] = self.seconds.get("gram", 0.0) + seen.seconds
        for shared in seen.shared:
            if not shared.stats.is_finite():
                names = ", ".join(site.name for site in shared.sites)
                raise SolveFailed(
                    f"Block {block.index}: the inputs of {names} hold NaN or infinite values: "
                    "check the model's weights, or run with --dtype float32."
                )
            self._solve_shared(block, shared)

    def _solve_shared(self, block: Block, shared: SharedInput) -> None:
        with self._timed("prepare"), _naming(shared.sites):
            state = self.method.prepare(shared.stats)
        for site in shared.sites:
            dense = site.read().to(torch.float32).clone()
            with self._timed("solve"), _naming([site]):
                solution = self.method.solve(dense, state, self.pattern)
            self._write(block, site, dense, solution, shared.stats)

    def _write(self, block: Block, site: Site, dense: Tensor, solution: Solution, stats: InputStats) -> None:
        stored = site.write(solution.weight)
        if not bool(torch.isfinite(stored).all()):
            raise SolveFailed(
                f"Site {site.name}: pruned weights overflow {site.dtype}: run with --dtype bfloat16 or float32."
            )
        for phase, seconds in solution.info.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        error = magnitude_error = None
        if self.measure_errors:
            with self._timed("errors"):
                by_size = masked(dense, keep_largest(dense.abs(), self.pattern))
                error, magnitude_error = relative_errors([stored.float(), by_size], dense, stats)
        self.records.append(
            LayerRecord(
                name=site.name,
                block=block.index,
                kind=site.kind,
                shape=site.shape,
                entries=stored.numel(),
                zeros=int((stored == 0).sum()),
                error=error,
                magnitude_error=magnitude_error,
                solve=solve_record(solution.info),
            )
        )
        self.watcher.step(site.name + ("" if error is None else f"  error {error:.4f}"))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def _on_device(self, block: Block) -> Iterator[None]:
        """Bring a block to the device for the time of the body."""
        home = next(block.module.parameters()).device
        block.module.to(self.device)
        try:
            yield
        finally:
            block.module.to(home)


def check_fit(blocks: list[Block], pattern: Pattern) -> None:
    """Refuse a pattern whose groups do not divide the inputs of every site.

    Raises:
        ConfigError: naming the sites.
    """
    misfits = [site for block in blocks for site in block.sites if not pattern.fits(site.shape[1])]
    if misfits:
        names = ", ".join(f"{site.name} ({site.shape[1]})" for site in misfits[:3])
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(
            f"Pattern {pattern} does not divide the number of inputs of {names}{more}: "
            "choose a group size that does, or an unstructured sparsity."
        )


@contextmanager
def _naming(sites: list[Site]) -> Iterator[None]:
    try:
        yield
    except SolveFailed as error:
        raise SolveFailed(f"Site {', '.join(site.name for site in sites)}: {error}.") from error
