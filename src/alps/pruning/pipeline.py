"""The walk: blocks in order, each pruned on what the already pruned ones before it produce.

For every block: one pass over the calibration batches collects the inputs of its sites, the sites are solved and
written back, a second pass turns the batches into the inputs of the next block. In sequential order there is a pass for
every input, which goes on behind what is settled, so that each site is solved on what those before it leave of it. With
a dense target or block matching the dense model walks beside: other activations, and a dense copy of one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import Activations
from alps.calibration.block_inputs import batch_tokens, capture_block_inputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward
from alps.calibration.layer_order import Order, observations
from alps.calibration.lm_head import Head
from alps.calibration.moe_statistics import LayerInput
from alps.core.device import exact_float32
from alps.core.distributed import ProcessGroup
from alps.core.half_precision import half_matmul_in_float32
from alps.core.memory import out_of_memory_as_error
from alps.core.phase_timer import PhaseTimer
from alps.core.progress import NoProgress, Progress
from alps.core.statistics import InputSums, Needs
from alps.finetuning.block_reconstruction import OutputLoss, ReconstructionParameters, reconstruct_block
from alps.models.blocks import Block, on_device
from alps.pruning.layer_rules import Rules
from alps.pruning.layer_solver import LayerSolver
from alps.pruning.resume import ResumableRun
from alps.pruning.row_weights import RowWeights, compute_row_weights
from alps.pruning.sparsity_allocation import check_fit, plan
from alps.pruning.work_sharing import solve_sites
from alps.reporting.records import ReconstructionRecord
from alps.reporting.run_report import LayerRecord
from alps.solvers.base import Method
from alps.solvers.patterns import Pattern

_NEEDS_LESS = "keep activations on the CPU with --offload, give fewer --samples, or use --dtype bfloat16"
_NEEDS_LESS_HERE = "keep activations in files with --activation-memory, give fewer --samples, or use --dtype bfloat16"


@dataclass
class BlockPruner:
    """One pruning of one model.

    Attributes:
        method, pattern: what to do to every site.
        device: where a block is run and solved; it is brought there and back.
        offload: keep the activations between blocks on the CPU.
        measure_errors: collect the Gram for every method, so that its error and magnitude's can be told.
        order: `block` observes all inputs of a block before anything in it is pruned; `sequential` observes each
            input once all sites before it are pruned.
        target: share of the dense target, see `alps.solvers.dense_target`; 0 reproduces the dense weight on the pruned
            prefix's inputs, 1 the dense model's own outputs.
        matching: tune every pruned block to the dense block's outputs, or None.
        budget: how the zeros are spread over the sites, see `alps.pruning.sparsity_allocation`.
        channels: what the rows of a site count, see `alps.pruning.row_weights`.
        rules: what else is said of parts of the model by name; `run` applies them before the walk begins.
        patterns: of single sites by name, in place of `pattern`; a budget that is not uniform adds all others.
        activation_bytes: of activations that are kept in memory between blocks; the rest goes to files. None: all.
        spill_folder: for those files; None for the system's folder of temporary files.
        respect_zeros: zeros that a site has stay zero, and count towards its pattern.
        watcher: told after every site.
        resumable: keeps every finished block, and has those of an earlier process; None keeps nothing.
        group: the processes that do it together; windows and sites are shared out among them.
        records, seconds: one for every site in the order of the solves; wall time by phase.
    """

    method: Method
    pattern: Pattern
    device: torch.device
    offload: bool = False
    measure_errors: bool = True
    order: Order = "block"
    target: float = 0.0
    matching: ReconstructionParameters | None = None
    budget: str = "uniform"
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    progress: Progress = field(default_factory=NoProgress)
    activation_bytes: int | None = None
    spill_folder: Path | None = None
    respect_zeros: bool = False
    channels: RowWeights = "equal"
    resumable: ResumableRun | None = None
    rules: Rules = field(default_factory=Rules)
    group: ProcessGroup = field(default_factory=ProcessGroup)
    records: list[LayerRecord] = field(default_factory=list)
    matches: list[ReconstructionRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._phases = PhaseTimer(self.device, self.seconds)

    @property
    def needs(self) -> Needs:
        """What is collected of every input."""
        if self.target:
            return Needs.INPUT_SHIFT
        return Needs.GRAM if self.measure_errors else self.method.needs

    @property
    def _peers(self) -> ProcessGroup | None:
        return self.group if self.group.size > 1 else None

    @property
    def reads_inputs(self) -> bool:
        """Whether calibration windows are needed."""
        others = self.matching is not None or self.budget != "uniform" or self.channels != "equal"
        return self.needs is not Needs.NOTHING or others

    def run(self, model: nn.Module, blocks: list[Block], windows: Tensor | None) -> None:
        """Prune every site of `blocks`, in place where the model is in memory.

        Args:
            model: the model the blocks belong to, in evaluation mode.
            blocks: its decoder blocks in order.
            windows: calibration token ids (windows, tokens); None only when nothing is collected.

        Raises:
            ConfigError: when the pattern does not fit a site, or the budget not the pattern.
            SolveFailed: when activations or answers are not finite; names the block or site.
            CheckpointError: when a finished block cannot be kept, or is damaged.
        """
        check_fit(blocks, self.pattern, self.patterns)
        restored = self.resumable is not None and self.resumable.has(blocks[-1])
        read = windows if self.reads_inputs and not restored else None
        assert read is not None or restored or not self.reads_inputs, "windows are missing"
        with (
            out_of_memory_as_error(_NEEDS_LESS, _NEEDS_LESS_HERE),
            exact_float32(),
            half_matmul_in_float32(self.device, model),
        ):
            if read is not None and self.budget != "uniform":
                self.patterns = {**self._planned(model, blocks, read), **self.patterns}
            self.progress.start(f"{self.method.name} {self.pattern}", sum(len(block.sites) for block in blocks))
            try:
                if read is None:
                    self._without_inputs(blocks)
                else:
                    self._with_inputs(model, blocks, read)
            finally:
                self.progress.finish()

    def _planned(self, model: nn.Module, blocks: list[Block], windows: Tensor) -> Mapping[str, Pattern]:
        if self.resumable is not None and (known := self.resumable.planned()) is not None:
            return known
        free = [block.with_sites([site for site in block.sites if site.name not in self.patterns]) for block in blocks]
        with self._phases.measure("allocation"):
            asked = (self.budget, self.pattern, self.device, self.respect_zeros, self.progress)
            found: Mapping[str, Pattern] = self.group.broadcast_from_main(lambda: plan(model, free, windows, *asked))
        if self.resumable is not None and self.group.is_main:
            self.resumable.plan(found)
        return found

    def _without_inputs(self, blocks: list[Block]) -> None:
        solver = self.solver(blocks, self._phases, self.records)
        for block in blocks:
            with on_device(block, self.device):
                if self._restored(block):
                    continue
                if self.resumable is not None:
                    self.resumable.begin(self.seconds)
                empty = [InputSums.zeros(site.shape[1], Needs.NOTHING, self.device) for site in block.sites]
                shared = [LayerInput(one, [site]) for one, site in zip(empty, block.sites, strict=True)]
                solve_sites(solver, self.group, block, shared)
                self._keep(block)

    def _with_inputs(self, model: nn.Module, blocks: list[Block], windows: Tensor) -> None:
        with self._phases.measure("capture"):
            tokens, tuned = windows.shape[1], self.matching
            sizes = [] if tuned is None else self.group.shard_batch_sizes(len(windows), tuned.tokens // tokens)
            windows = self.group.shard(windows)
            home = torch.device("cpu") if self.offload else self.device
            kept = Activations(home, self.activation_bytes, self.spill_folder)
            inputs = capture_block_inputs(
                model, blocks, windows, sizes or max(batch_tokens(blocks, self.device) // tokens, 1), kept
            )
        split = torch.split(windows, [len(one) for one in inputs.hidden])
        predictions = OutputLoss(Head(model, blocks, inputs.bare), split)
        dense_inputs = inputs.beside() if self.target > 0 or self.matching is not None else None
        solver = self.solver(blocks, self._phases, self.records)
        for block in blocks:
            with on_device(block, self.device):
                dense = None if dense_inputs is None else DenseReference(block.clone(), dense_inputs)
                ending = predictions if block is blocks[-1] else None
                restored = self._restored(block)
                rest, advances = inputs, self.matching is None and ending is None
                if not restored:
                    if self.resumable is not None:
                        self.resumable.begin(self.seconds)
                    if self.channels != "equal":
                        with self._phases.measure("row_weights"):
                            solver.channels = compute_row_weights(block, inputs, self.device, self.group)
                    if self.order == "sequential":
                        rest = CachedForward(block, inputs, self.device, advances)
                    steps = observations(block, rest, self.needs, self.device, self.order, dense, self._peers)
                    for seen in self._phases.measure_observations(steps):
                        solve_sites(solver, self.group, block, seen.shared)
                if dense is not None and (self.matching is not None or ending is None):
                    with self._phases.measure("forward"):
                        dense.advance(self.device)
                if not restored:
                    if self.matching is not None:
                        assert dense is not None
                        rest = inputs  # what was settled is tuned now
                        with self._phases.measure("reconstruct"):
                            how = (self.matching, self.device, 0, ending, self._peers, dense.block)
                            self.matches.append(reconstruct_block(block, inputs, dense.inputs.hidden, *how))
                    self._keep(block)
                if ending is None:
                    with self._phases.measure("forward"):
                        rest.advance(block.index, block.module, self.device)

    def solver(self, blocks: list[Block], phases: PhaseTimer, records: list[LayerRecord]) -> LayerSolver:
        """What prunes the sites of these blocks; time and records go where it is told."""
        return LayerSolver(
            method=self.method,
            pattern=self.pattern,
            patterns=self.patterns,
            respect_zeros=self.respect_zeros,
            measure_errors=self.measure_errors,
            target=self.target,
            counted=self.reads_inputs,
            # Reports show how some sites were solved: those of the first, the middle and the last block.
            shown=frozenset(blocks[place].index for place in (0, len(blocks) // 2, -1)),
            progress=self.progress,
            phases=phases,
            records=records,
        )

    def _restored(self, block: Block) -> bool:
        """Whether an earlier process has finished the block, which then has its weights."""
        if self.resumable is None or not self.resumable.has(block):
            return False
        sites, matched = self.resumable.restore(block, self.seconds)
        self.records += sites
        self.matches += [] if matched is None else [matched]
        for site in sites:
            self.progress.step(f"{site.name}  as it was kept")
        return True

    def _keep(self, block: Block) -> None:
        if self.resumable is not None:
            with self._phases.measure("journal"):
                sites = [record for record in self.records if record.block == block.index]
                self.resumable.keep(block, sites, self.matches[-1] if self.matching else None, self.seconds)
