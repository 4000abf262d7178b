"""The walk: blocks in order, each pruned on what the already pruned ones before it produce.

For every block: one pass over the calibration batches collects the inputs of its sites, the sites are solved and
written back, a second pass turns the batches into the inputs of the next block. In sequential order there is a pass
for every input of a block, so that each site is solved on what the pruned ones before it leave of its inputs. With a
dense target or block matching the dense model walks beside: a second set of activations, and a dense copy of one block.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alps.budgets import check_budget, check_fit, plan
from alps.errors import SolveFailed
from alps.matching import Matching, Predictions, match
from alps.models.blocks import Block, on_device
from alps.models.capture import BlockInputs, capture
from alps.models.observe import Observation
from alps.models.order import Order, observations
from alps.models.probe import Head
from alps.models.sites import Site, find_sites
from alps.models.starving import SharedInput
from alps.models.streams import DenseStream
from alps.progress import Silent, Watcher
from alps.records import MatchRecord
from alps.report import LayerRecord, solve_record
from alps.runtime import exact_float32
from alps.solvers.base import Method, Solution
from alps.solvers.objective import relative_errors
from alps.solvers.pattern import Pattern, keep_largest
from alps.solvers.selection import masked
from alps.solvers.target import correction, retarget
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
        order: `block` observes all inputs of a block before anything in it is pruned; `sequential` observes each
            input once all sites before it are pruned.
        target: share of the dense target, see `alps.solvers.target`; 0 reproduces the dense weight on the pruned
            prefix's inputs, 1 the dense model's own outputs.
        target_damping: what draws the dense target back to the dense weight, as a share of the Gram's mean diagonal.
        matching: tune every pruned block to the dense block's outputs, or None.
        budget: how the zeros are spread over the sites, see `alps.budgets`.
        patterns: of single sites by name, in place of `pattern`; a budget that is not uniform fills it.
        watcher: told after every site.
        records: one for every site, in the order in which they were solved.
        seconds: wall time by phase.
    """

    method: Method
    pattern: Pattern
    device: torch.device
    offload: bool = False
    measure_errors: bool = True
    order: Order = "block"
    target: float = 0.0
    matching: Matching | None = None
    budget: str = "uniform"
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=Silent)
    target_damping: float = 0.01
    records: list[LayerRecord] = field(default_factory=list)
    matches: list[MatchRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _shown: frozenset[int] = frozenset()

    @property
    def needs(self) -> Needs:
        """What is collected of every input."""
        if self.target:
            return Needs.DRIFT
        return Needs.GRAM if self.measure_errors else self.method.needs

    @property
    def reads_inputs(self) -> bool:
        """Whether calibration windows are needed."""
        return self.needs is not Needs.NOTHING or self.matching is not None or self.budget != "uniform"

    def run(self, model: nn.Module, blocks: list[Block], windows: Tensor | None) -> None:
        """Prune every site of `blocks` in place.

        Args:
            model: the model the blocks belong to, in evaluation mode.
            blocks: its decoder blocks in order.
            windows: calibration token ids (windows, tokens); None only when nothing is collected.

        Raises:
            ConfigError: when the pattern does not fit a site, or the budget not the pattern.
            SolveFailed: when activations or answers are not finite; names the block or site.
        """
        check_fit(blocks, self.pattern, self.patterns)
        check_budget(self.budget, self.pattern)
        # Reports show how some sites were solved: those of the first, the middle and the last block.
        self._shown = frozenset(blocks[place].index for place in (0, len(blocks) // 2, -1))
        self.watcher.start(f"{self.method.name} {self.pattern}", sum(len(block.sites) for block in blocks))
        try:
            with exact_float32():
                if not self.reads_inputs:
                    self._without_inputs(blocks)
                else:
                    assert windows is not None
                    if self.budget != "uniform":
                        with self._timed("budget"):
                            self.patterns = plan(model, blocks, windows, self.budget, self.pattern, self.device)
                    self._with_inputs(model, blocks, windows)
        finally:
            self.watcher.finish()

    def _without_inputs(self, blocks: list[Block]) -> None:
        for block in blocks:
            with on_device(block, self.device):
                for site in block.sites:
                    empty = InputStats.zeros(site.shape[1], Needs.NOTHING, self.device)
                    self._solve_shared(block, SharedInput(empty, [site]))

    def _with_inputs(self, model: nn.Module, blocks: list[Block], windows: Tensor) -> None:
        with self._timed("capture"):
            batch_tokens = _BATCH_TOKENS if self.matching is None else self.matching.tokens
            inputs = capture(model, blocks, windows, max(batch_tokens // windows.shape[1], 1))
            storage = torch.device("cpu") if self.offload else self.device
            inputs.hidden = [hidden.to(storage) for hidden in inputs.hidden]
        predictions = Predictions(Head(model, blocks), torch.split(windows, inputs.hidden[0].shape[0]))
        walks_dense = self.target > 0 or self.matching is not None
        dense_inputs = BlockInputs(list(inputs.hidden), inputs.calls) if walks_dense else None
        for block in blocks:
            with on_device(block, self.device):
                dense = None if dense_inputs is None else DenseStream(_twin(block), dense_inputs)
                for seen in self._observations(block, inputs, dense):
                    self._solve_observed(block, seen)
                if dense is not None and (self.matching is not None or block is not blocks[-1]):
                    with self._timed("forward"):
                        dense.advance(self.device)
                if self.matching is not None:
                    assert dense is not None
                    with self._timed("match"):
                        ending = predictions if block is blocks[-1] else None
                        targets = dense.inputs.hidden
                        self.matches.append(match(block, inputs, targets, self.matching, self.device, 0, ending))
                if block is not blocks[-1]:
                    with self._timed("forward"):
                        inputs.advance(block.index, block.module, self.device)

    def _observations(self, block: Block, inputs: BlockInputs, dense: DenseStream | None) -> Iterator[Observation]:
        steps = observations(block, inputs, self.needs, self.device, self.order, dense)
        while True:
            with self._timed("forward"):
                seen = next(steps, None)
            if seen is None:
                return
            self.seconds["forward"] -= seen.seconds
            self.seconds["gram"] = self.seconds.get("gram", 0.0) + seen.seconds
            yield seen

    def _solve_observed(self, block: Block, seen: Observation) -> None:
        for shared in seen.shared:
            if not shared.stats.is_finite():
                names = ", ".join(site.name for site in shared.sites)
                raise SolveFailed(
                    f"Block {block.index}: the inputs of {names} hold NaN or infinite values: "
                    "check the model's weights, or run with --dtype float32."
                )
            self._solve_shared(block, shared)

    def _solve_shared(self, block: Block, shared: SharedInput) -> None:
        shown = block.index in self._shown and not shared.sites[0].expert
        shift, method = None, self.method.traced() if shown else self.method
        with self._timed("prepare"), _naming(shared.sites):
            state = method.prepare(shared.stats)
            if shared.stats.drift is not None:
                shift = correction(shared.stats, self.target, self.target_damping)
        for site in shared.sites:
            aim = site.read().to(torch.float32).clone()
            if shift is not None:
                aim = retarget(aim, shift)
            with self._timed("solve"), _naming([site]):
                solution = method.solve(aim, state, self.patterns.get(site.name, self.pattern))
            self._write(block, site, aim, solution, shared)

    def _write(self, block: Block, site: Site, aim: Tensor, solution: Solution, shared: SharedInput) -> None:
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
                pattern = self.patterns.get(site.name, self.pattern)
                by_size = masked(aim, keep_largest(aim.abs(), pattern))
                error, magnitude_error = relative_errors([stored.float(), by_size], aim, shared.stats)
        solution.info.notes = [*solution.info.notes, *shared.notes]
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
                expert=site.expert,
                tokens=shared.tokens if self.reads_inputs else None,
                added=shared.added,
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


def _twin(block: Block) -> Block:
    module = copy.deepcopy(block.module)
    return Block(block.index, block.name, module, find_sites(block.name, module))


@contextmanager
def _naming(sites: list[Site]) -> Iterator[None]:
    try:
        yield
    except SolveFailed as error:
        raise SolveFailed(f"Site {', '.join(site.name for site in sites)}: {error}.") from error
