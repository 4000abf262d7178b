"""Results of finished blocks, and the journal that keeps them on disk for a later process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import ConfigDict, ValidationError

from alps.checkpoints.journal import Journal
from alps.checkpoints.safetensors_io import check_result
from alps.core.distributed import ProcessGroup
from alps.core.errors import CheckpointError
from alps.models.blocks import Block
from alps.reporting.records import ReconstructionRecord, Record
from alps.reporting.run_report import LayerRecord
from alps.solvers.patterns import Pattern, Unstructured, parse_pattern

_ALLOCATION = "allocation"


class BlockResult(Record):
    """Outcome of one pruned block.

    Attributes:
        layers: records of its layers in the order of the forward.
        reconstruction: record of its reconstruction; None without one.
        seconds: wall time by phase, and in all under `total`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[LayerRecord]
    reconstruction: ReconstructionRecord | None
    seconds: dict[str, float]


class RunJournal(Protocol):
    """Store of the finished blocks of a run."""

    def is_finished(self, block: Block) -> bool:
        """Return True if the journal holds the block."""

    def restore(self, block: Block) -> BlockResult | None:
        """Load the pruned weights of a finished block into its module; None, and no change, for any other block."""

    def save(self, block: Block, result: BlockResult) -> None:
        """Keep the weights and the result of a block that is finished now."""

    def load_allocation(self) -> dict[str, Pattern] | None:
        """Return the patterns of the layers by name, None if none were saved."""

    def save_allocation(self, patterns: Mapping[str, Pattern]) -> None:
        """Keep the patterns of the layers by name."""


class NullJournal:
    """Journal of a run that keeps nothing."""

    def is_finished(self, block: Block) -> bool:  # noqa: ARG002
        """Return False."""
        return False

    def restore(self, block: Block) -> BlockResult | None:  # noqa: ARG002
        """Return None."""
        return None

    def save(self, block: Block, result: BlockResult) -> None:
        """Do nothing."""

    def load_allocation(self) -> dict[str, Pattern] | None:
        """Return None."""
        return None

    def save_allocation(self, patterns: Mapping[str, Pattern]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class DiskJournal:
    """Journal in a directory next to the output.

    Attributes:
        journal: files of the directory.
        group: ranks of the run. They write the tensors of blocks in turn; the main rank marks a block as finished.
    """

    journal: Journal
    group: ProcessGroup

    def is_finished(self, block: Block) -> bool:
        """Return True if the journal holds the block."""
        return block.index < self.journal.finished

    def restore(self, block: Block) -> BlockResult | None:
        """Load the pruned weights of a finished block into its module; None, and no change, for any other block.

        Raises:
            CheckpointError: when the files of the block are damaged.
        """
        if not self.is_finished(block):
            return None
        stored, state = self.journal.tensors(block.index), block.module.state_dict()
        try:
            result = BlockResult.model_validate(self.journal.record(block.index))
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(stored[name].read())
        except (ValidationError, KeyError, RuntimeError):
            raise CheckpointError(
                f"Block {block.index} in '{self.journal.directory}' is damaged: delete that directory and start again."
            ) from None
        return result

    def save(self, block: Block, result: BlockResult) -> None:
        """Keep the weights and the result of a block that is finished now.

        Raises:
            CheckpointError: when the files cannot be written, or the weights hold NaN.
        """
        if block.index % self.group.size == self.group.rank:
            check_result(block.module, str(self.journal.directory))
            self.journal.save_tensors(block.index, dict(block.module.state_dict()))
        self.group.barrier()
        if self.group.is_main:
            self.journal.save_record(block.index, result.model_dump(mode="json"))

    def load_allocation(self) -> dict[str, Pattern] | None:
        """Return the patterns of the layers by name, None if none were saved."""
        patterns = self.journal.notes.get(_ALLOCATION)
        return None if patterns is None else {name: parse_pattern(text) for name, text in patterns.items()}

    def save_allocation(self, patterns: Mapping[str, Pattern]) -> None:
        """Keep the patterns of the layers by name."""
        if self.group.is_main:
            self.journal.note(_ALLOCATION, {name: _exact_text(pattern) for name, pattern in patterns.items()})


def _exact_text(pattern: Pattern) -> str:
    return repr(pattern.sparsity) if isinstance(pattern, Unstructured) else str(pattern)
