"""Finished blocks of a walk: written down as soon as they are done, and taken up again by a later process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError

from alps.checkpoints.journal import Journal
from alps.core.distributed import ProcessGroup
from alps.core.errors import CheckpointError
from alps.models.blocks import Block
from alps.models.finite_check import check_result
from alps.reporting.records import ReconstructionRecord, Record
from alps.reporting.run_report import LayerRecord
from alps.solvers.patterns import Pattern, Unstructured, parse_pattern

_PLAN = "patterns"


class _BlockRecord(Record):
    """A finished block: the records of its sites and of its matching, and what it took by phase."""

    sites: list[LayerRecord]
    match: ReconstructionRecord | None
    seconds: dict[str, float]


@dataclass
class ResumableRun:
    """The side of a walk that outlives its process.

    Attributes:
        journal: where finished blocks go.
        group: the processes of the run: they take turns in writing blocks, and the first one says that a block is done.
        before: wall time of the blocks that an earlier process has finished, in seconds.
    """

    journal: Journal
    group: ProcessGroup = field(default_factory=ProcessGroup)
    before: float = 0.0
    _phases: dict[str, float] = field(default_factory=dict)
    _begun: float = 0.0

    def has(self, block: Block) -> bool:
        """Whether the block is finished."""
        return block.index < self.journal.finished

    def begin(self, seconds: Mapping[str, float]) -> None:
        """A block begins; `seconds` are those of the walk so far, by phase."""
        self._phases, self._begun = dict(seconds), time.perf_counter()

    def keep(
        self, block: Block, sites: list[LayerRecord], match: ReconstructionRecord | None, seconds: Mapping[str, float]
    ) -> None:
        """The block that was begun is done: write it down.

        Raises:
            CheckpointError: when it cannot be written, or holds NaN.
        """
        mine = block.index % self.group.size == self.group.rank
        if mine:
            check_result(block.module, str(self.journal.directory))
        spent = {phase: total - self._phases.get(phase, 0.0) for phase, total in seconds.items()}
        spent["total"] = time.perf_counter() - self._begun
        record = _BlockRecord(sites=sites, match=match, seconds=spent)
        if mine:
            self.journal.save_tensors(block.index, dict(block.module.state_dict()))
        self.group.barrier()
        if self.group.is_main:
            self.journal.save_record(block.index, record.model_dump(mode="json"))

    def restore(self, block: Block, seconds: dict[str, float]) -> tuple[list[LayerRecord], ReconstructionRecord | None]:
        """Give the block its finished weights, and `seconds` the time that they took.

        Raises:
            CheckpointError: when the block was damaged since.
        """
        stored, state = self.journal.tensors(block.index), block.module.state_dict()
        try:
            found = _BlockRecord.model_validate(self.journal.record(block.index))
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(stored[name].read())
        except (ValidationError, KeyError, RuntimeError):
            raise CheckpointError(
                f"Block {block.index} in '{self.journal.directory}' is damaged: delete that directory and start again."
            ) from None
        self.before += found.seconds.pop("total", 0.0)
        for phase, spent in found.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        return found.sites, found.match

    def planned(self) -> dict[str, Pattern] | None:
        """The patterns of a budget that an earlier process has planned."""
        plan = self.journal.notes.get(_PLAN)
        return None if plan is None else {name: parse_pattern(text) for name, text in plan.items()}

    def plan(self, patterns: Mapping[str, Pattern]) -> None:
        """Keep the patterns of a budget."""
        self.journal.note(_PLAN, {name: _exact(pattern) for name, pattern in patterns.items()})


def _exact(pattern: Pattern) -> str:
    return repr(pattern.sparsity) if isinstance(pattern, Unstructured) else str(pattern)
